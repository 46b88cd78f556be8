"""Calibration text from the model's own continuations.

A draft is judged while the whole model writes, and a pruned model drifts where it reads what it
wrote itself: long chains break first. So the whole model continues prompts greedily, and only the
tokens that it wrote are targets.
"""

from __future__ import annotations

import numpy as np
import torch
from shared import arguments, evaluator

import fastprune as fp

PROMPT = 16  # tokens of a row that the model continues


@torch.no_grad()
def continued(hf, prompts: torch.Tensor, length: int) -> torch.Tensor:
    """The prompts [N, P] with `length` tokens that the model finds most likely, [N, P + length]."""
    settings = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length}
    rows = [
        hf.generate(row[None], attention_mask=torch.ones_like(row[None]), **settings)
        for row in prompts
    ]
    return torch.cat(rows)


def written_batch(rows: torch.Tensor, prompt_length: int = PROMPT) -> fp.TokenBatch:
    """Rows whose targets are the tokens behind the prompt."""
    labels = rows.clone()
    labels[:, :prompt_length] = -100
    return fp.TokenBatch.from_ids(
        [{"input_ids": row[None], "labels": own[None]} for row, own in zip(rows, labels)]
    )


def main() -> None:
    hf, rows = arguments("continuations")
    own = continued(hf, rows[:, :PROMPT], rows.shape[1] - PROMPT)
    on_own = fp.Evaluator(hf, fp.Perplexity(written_batch(own)))
    on_text = evaluator(hf, rows)
    singles = fp.from_removed([(unit,) for unit in range(on_own.num_units)], on_own.num_units)
    losses = {"text": on_text.score(singles), "own": on_own.score(singles)}
    for name, of in losses.items():
        print(f"blocks by their loss alone, on {name}: {np.argsort(of, kind='stable').tolist()}")


if __name__ == "__main__":
    main()
