"""Self-speculative decoding (Draft & Verify, arXiv 2309.08168): the model without some attentions
and MLPs drafts tokens, and the whole model checks them. A search finds the draft that agrees most;
transformers' assisted generation then counts the drafted tokens that the whole model accepts.

speculative.py [MODEL] [--text FILE] [--rows N] [--length T]
"""

from __future__ import annotations

import copy

import torch
from continuations import PROMPT, continued, written_batch
from shared import arguments
from transformers.utils import logging

import fastprune as fp

REMOVE = 8  # attentions and MLPs that the draft leaves out
DRAFTED = 5  # tokens of one draft
STAYS = (0,)  # transformers asks the first attention how long its cache is


def best_draft(hf, batch: fp.TokenBatch, num_remove: int = REMOVE) -> tuple[int, ...]:
    """The halves of blocks without which the model agrees most with itself, greedily."""
    ev = fp.Evaluator(hf, fp.Agreement(batch, decoding="greedy"), granularity="sublayer")
    return fp.run_search(ev, "greedy", num_remove=num_remove, protect=STAYS).removed


def predicted(hf, batch: fp.TokenBatch, removed) -> float:
    """The share of the batch's targets that the draft gets right, without generating a token."""
    ev = fp.Evaluator(hf, fp.Agreement(batch, decoding="greedy"), granularity="sublayer")
    return 1 - float(ev.score(fp.from_removed([removed], ev.num_units))[0])


def measured(hf, prompts: torch.Tensor, length: int, removed) -> tuple[float, torch.Tensor]:
    """The share of the drafted tokens checked that the whole model accepts, and what it writes.

    A draft is checked up to its first wrong token.
    """
    twin = copy.deepcopy(hf, {id(weight): weight for weight in hf.parameters()})  # weights shared
    checked = accepted = 0
    rows = []
    with fp.masked(twin, removed, granularity="sublayer") as draft, torch.no_grad():
        config = draft.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = DRAFTED, "constant"
        config.assistant_confidence_threshold = 0.0
        spans: list[tuple[int, int]] = []  # the first and the last position of each draft
        generate = draft.generate

        def noted(*args, **inputs):
            found = generate(*args, **inputs)
            spans.append((inputs["input_ids"].shape[1], found.sequences.shape[1]))
            return found

        draft.generate = noted
        settings = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length}
        for row in prompts:
            spans.clear()
            mask = torch.ones_like(row[None])
            rows.append(
                hf.generate(row[None], attention_mask=mask, assistant_model=draft, **settings)
            )
            ends = [start for start, _ in spans[1:]] + [rows[-1].shape[1]]
            for (start, stop), end in zip(spans, ends, strict=True):
                right = min(end - 1 - start, stop - start)  # the last new token is the model's own
                accepted += right
                checked += right + (right < stop - start)
    return accepted / checked, torch.cat(rows)


def compare(hf, rows: torch.Tensor) -> dict:
    """The draft found on one half of the rows, and its acceptance on the other half."""
    length, half = rows.shape[1] - PROMPT, len(rows) // 2
    own = continued(hf, rows[:, :PROMPT], length)
    removed = best_draft(hf, written_batch(own[:half]))
    share, written = measured(hf, rows[half:, :PROMPT], length, removed)
    return {
        "removed": removed,
        "predicted": predicted(hf, written_batch(own[half:]), removed),
        "measured": share,
        "same_text": bool(torch.equal(written, own[half:])),
    }


if __name__ == "__main__":
    logging.set_verbosity_error()  # of generation settings that assisted generation passes on
    found = compare(*arguments("speculative"))
    print(f"the draft leaves out the halves {found['removed']}")
    print(f"acceptance: predicted {found['predicted']:.1%}, measured {found['measured']:.1%}")
    print(f"the same text as without a draft: {found['same_text']}")
