"""Tools that the examples share: a model and rows of tokens, the loss as other tools take it, and
a stopwatch.

Each example has two functions of (hf, rows): `loop`, as a tool of the field writes it, with
transformers only, and `fast`, the same with fastprune. Both return (what was chosen, the losses
that decided it).
"""

from __future__ import annotations

import argparse
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fastprune as fp
from fastprune import demo


def open_model(folder: str | Path = "demo"):
    """A Llama-like transformers model and its tokenizer."""
    folder = demo.MODEL_DIR if str(folder) == "demo" else folder
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def read_rows(tokenizer, text: str | Path, rows: int, length: int) -> torch.Tensor:
    """Windows of a text file, int64[rows, length]."""
    return torch.as_tensor(fp.load_text(text, tokenizer, rows, length).ids).reshape(-1, length)


@torch.no_grad()
def loss(hf, rows: torch.Tensor) -> float:
    """Mean negative log-likelihood, one row at a time, from full logits."""
    return sum(
        hf(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in rows
    ) / len(rows)


def evaluator(hf, rows: torch.Tensor, **options) -> fp.Evaluator:
    """The same loss with fastprune."""
    return fp.Evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows)), **options)


@contextmanager
def blocks(hf, sequence):
    """The model with these blocks in its list, as depth-pruning tools do it."""
    whole, depth = hf.model.layers, hf.config.num_hidden_layers
    hf.model.layers = torch.nn.ModuleList(whole[block] for block in sequence)
    hf.config.num_hidden_layers = len(hf.model.layers)
    try:
        yield
    finally:
        hf.model.layers, hf.config.num_hidden_layers = whole, depth


def without(hf, removed):
    """The model without these blocks."""
    return blocks(hf, [block for block in range(len(hf.model.layers)) if block not in removed])


@contextmanager
def without_halves(hf, removed):
    """The model without these halves of blocks: 2i is block i's attention, 2i + 1 its mlp; each
    then adds nothing."""
    halves = [half for layer in hf.model.layers for half in (layer.self_attn, layer.mlp)]
    for half in removed:
        if half % 2:
            halves[half].forward = torch.zeros_like
        else:
            halves[half].forward = lambda hidden_states, **kwargs: (
                torch.zeros_like(hidden_states),
                None,
            )
    try:
        yield
    finally:
        for half in removed:
            del halves[half].forward


def compare(loop, fast, hf, rows) -> dict:
    """CPU seconds of both, their ratio, and whether they chose the same by the same losses."""
    results, seconds = [], []
    for run in (loop, fast):
        started = time.process_time()
        results.append(run(hf, rows))
        seconds.append(time.process_time() - started)
    (chosen, losses), (also, found) = results
    same = list(chosen) == list(also) and np.allclose(losses, found, rtol=2e-4, atol=2e-5)
    return {
        "loop": seconds[0],
        "fast": seconds[1],
        "ratio": seconds[0] / seconds[1],
        "same": same,
        "chosen": chosen,
    }


def main(name: str, loop, fast) -> None:
    """Run an example from the shell: NAME.py [MODEL] [--text FILE] [--rows N] [--length T]."""
    hf, rows = arguments(name)
    report(name, compare(loop, fast, hf, rows))


def arguments(name: str):
    """The model and the rows that the command line of an example names."""
    return open_rows(options(name).parse_args())


def options(name: str) -> argparse.ArgumentParser:
    """The options of an example."""
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument(
        "model", nargs="?", default="demo", help="'demo', or a folder of a Llama-like model"
    )
    parser.add_argument("--text", default=demo.TEXT)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    return parser


def open_rows(given: argparse.Namespace):
    """The model and the rows that the options name."""
    hf, tokenizer = open_model(given.model)
    return hf, read_rows(tokenizer, given.text, given.rows, given.length)


def report(name: str, row: dict) -> None:
    verdict = "the same" if row["same"] else "NOT THE SAME"
    numbers = (
        f"loop {row['loop']:7.1f} s, fastprune {row['fast']:6.1f} s of CPU, "
        f"{row['ratio']:5.1f} x, {verdict}"
    )
    print(f"{name:20} {numbers}: {row['chosen']}", flush=True)
