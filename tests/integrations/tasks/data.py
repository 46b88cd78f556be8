"""The demo model's held-out questions and text, as the harness's tasks take them."""

from __future__ import annotations

import json
from pathlib import Path

import datasets

from fastprune import demo


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(**_) -> dict[str, datasets.Dataset]:
    found = [
        {name: row[name] for name in ("prompt", "choices", "answer")}
        for row in rows(demo.QUESTIONS_HELDOUT)
    ]
    return {
        "test": datasets.Dataset.from_list(found),
        "train": datasets.Dataset.from_list(found[-20:]),
    }


def texts(**_) -> dict[str, datasets.Dataset]:
    return {
        "test": datasets.Dataset.from_list(
            [{"text": row["text"]} for row in rows(demo.TEXT_HELDOUT)]
        )
    }


def perplexity(doc: dict, results: list) -> dict:
    """Sums of log-likelihoods, with the words and bytes that they are divided by."""
    (likelihood,) = results
    words, size = len(doc["text"].split()), len(doc["text"].encode())
    return {
        "word_perplexity": (likelihood, words),
        "byte_perplexity": (likelihood, size),
        "bits_per_byte": (likelihood, size),
    }
