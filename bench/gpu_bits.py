"""The promise that a mask's score is the same to the bit, alone or in company, at the shapes of
LLaMA-3 8B.

A few blocks suffice, since every block runs the same code on the same shapes; rows and chunks are
those of the searches that are timed.
"""

from __future__ import annotations

import numpy as np
from gpu_measure import Bench
from gpu_models import chunk_shapes, random_model, random_tasks

import fastprune as fp

# what is scored, and by which path: rows of text and questions, every kernel of the head,
# transformers' own layers
CASES = {
    "plain rows": ("fused", "text", fp.Perplexity),
    "trees": ("fused", "questions", fp.TaskMargin),
    "plain rows, divergence": ("fused", "text", fp.KLDivergence),
    "plain rows, transformers' layers": ("generic", "text", fp.Perplexity),
    "trees, transformers' layers": ("generic", "questions", fp.TaskMargin),
}


def bits(bench: Bench, name: str) -> dict:
    """Every case by every grouping of its masks: how many numbers differ in a bit from the mask's
    alone."""
    num_blocks, num_masks = bench.pick((6, 16), (4, 5))
    hf = bench.model(f"{name}, {num_blocks} blocks", lambda: random_model(bench, name, num_blocks))
    vocab = hf.config.vocab_size
    rows = np.random.default_rng(0).integers(0, vocab, bench.pick((12, 2048), (34, 9)))
    sets = {
        "text": fp.TokenBatch.from_ids(rows),
        "questions": random_tasks(bench, vocab, *bench.pick((128, 100, 4, 6), (34, 5, 2, 2))),
    }
    masks = _masks(num_blocks, num_masks)
    found: dict = {"blocks": num_blocks, "masks": num_masks, "equal": False, "cases": {}}
    for case, (backend, data, objective) in CASES.items():

        def evaluator(backend=backend, data=data, objective=objective) -> fp.Evaluator:
            return fp.Evaluator(hf, objective(sets[data]), backend=backend)

        ev = evaluator()
        alone = np.concatenate([ev.score_samples(mask[None]) for mask in masks])
        found["cases"][case] = {
            "chunks": chunk_shapes(ev),
            "backend": ev.backend,
            "finite": bool(np.isfinite(alone).all()),
            "different": {
                how: _different(scores, alone) for how, scores in _groupings(ev, evaluator, masks)
            },
        }
        bench.save("bits", {"model": name, **found})
        bench.free()
    found["equal"] = all(
        case["finite"] and not any(of["numbers"] for of in case["different"].values())
        for case in found["cases"].values()
    )
    return found


def _masks(num_blocks: int, num_masks: int) -> np.ndarray:
    """The dense model, and distinct random masks that keep something, bool[N, U]."""
    every = (np.arange(1, 1 << num_blocks)[:, None] >> np.arange(num_blocks) & 1).astype(bool)
    chosen = np.random.default_rng(1).permutation(len(every) - 1)[: num_masks - 1]
    return every[np.append(len(every) - 1, chosen)]


def _groupings(ev: fp.Evaluator, evaluator, masks: np.ndarray):
    """(how, scores float64[N, S] in the order of the masks)."""
    rng = np.random.default_rng(2)
    yield "once more", np.concatenate([ev.score_samples(mask[None]) for mask in masks])
    yield "grouped", ev.score_samples(masks)
    order = np.concatenate([rng.permutation(len(masks)), rng.integers(0, len(masks), len(masks))])
    yield "shuffled and repeated", _back(ev.score_samples(masks[order]), order)
    order, parts = rng.permutation(len(masks)), []
    for part in np.array_split(order, 3):
        parts.append(ev.score_samples(masks[part]))
    yield "three groups", _back(np.concatenate(parts), order)
    yield "grouped, cold", evaluator().score_samples(masks)
    cold = evaluator()
    yield (
        "backwards, cold",
        np.concatenate([cold.score_samples(mask[None]) for mask in masks[::-1]])[::-1],
    )


def _back(scores: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Scores in the masks' own order; of a mask that was asked for twice, the second."""
    back = np.empty((order.max() + 1, scores.shape[1]))
    back[order] = scores
    return back


def _different(scores: np.ndarray, alone: np.ndarray) -> dict[str, float]:
    differ = np.ascontiguousarray(scores).view(np.int64) != alone.view(np.int64)
    greatest = np.abs(scores - alone)[differ].max() if differ.any() else 0.0
    return {"numbers": int(differ.sum()), "of": differ.size, "greatest": float(greatest)}
