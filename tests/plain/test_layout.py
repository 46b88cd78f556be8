"""Layouts: every row once, no chunk beyond a look, written down and read again, and wrong ones
refused."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fastprune import InputError, TokenBatch
from fastprune.plan.layout import RUN_TOKENS, Layout, make_layout
from fastprune.plan.racing import look_of, look_rows


@pytest.fixture(scope="module")
def batch():
    """40 rows, plain ones of 2 to 21 tokens and questions of two choices."""
    rng = np.random.default_rng(0)
    plain = [[(rng.integers(0, 50, rng.integers(2, 22)), 1)] for _ in range(25)]
    trunk = np.arange(3)
    questions = [
        [(np.append(trunk, [7] * n), 3), (np.append(trunk, [8] * n), 3)] for n in range(1, 16)
    ]
    return TokenBatch.from_continuations(plain + questions)


@pytest.mark.parametrize("max_tokens", [1, 30, 64, 10_000])
def test_a_layout_holds_every_row_once_and_can_be_written_down(batch, max_tokens):
    layout = make_layout(batch, max_tokens, 8)
    layout.check(batch)
    assert Layout.from_json(layout.to_json()) == layout
    looks = [set(look.tolist()) for look in look_rows(batch)]
    for chunk in layout.chunks:
        assert any(look.issuperset(chunk) for look in looks)
        assert len(chunk) == 1 or len(chunk) * batch.row_lengths[list(chunk)].max() <= max_tokens


@pytest.mark.parametrize("max_tokens", [1, 60, 150, 10_000])
def test_chunks_cost_the_least(max_tokens):
    """The cut of 10 rows, longest first, costs the least of all: tokens with padding, and for each
    chunk the other costs of a run."""
    lengths = np.sort(np.random.default_rng(1).integers(2, 60, 10))[::-1]
    batch = TokenBatch.from_ids([[1] * n for n in lengths])

    def cost(sizes):
        starts = np.cumsum([0, *sizes[:-1]])
        if any(
            n > 1 and n * lengths[start] > max_tokens
            for start, n in zip(starts, sizes, strict=True)
        ):
            return np.inf
        return sum(n * lengths[start] + RUN_TOKENS for start, n in zip(starts, sizes, strict=True))

    cuts = [
        [i for i, cut in enumerate(flags, 1) if cut]
        for flags in itertools.product((False, True), repeat=9)
    ]
    least = min(cost(np.diff([0, *places, 10]).tolist()) for places in cuts)
    chunks = make_layout(batch, max_tokens, 8).chunks
    assert list(itertools.chain(*chunks)) == list(range(10))
    assert cost([len(chunk) for chunk in chunks]) == least


def test_rows_of_one_length_fill_their_chunks():
    batch = TokenBatch.from_ids([[1] * 16] * 10)
    assert [len(chunk) for chunk in make_layout(batch, 64, 8).chunks] == [4, 4, 2]


def test_rows_that_fill_a_chunk_run_alone():
    batch = TokenBatch.from_ids([[1] * n for n in (64, 33, 40, 64)])
    assert sorted(make_layout(batch, 64, 8).chunks) == [(0,), (1,), (2,), (3,)]


def test_a_layout_that_crosses_looks_has_one(batch):
    raced = make_layout(batch, 10_000, 8)
    assert raced.looks(batch).tolist() == look_of(batch).tolist()
    assert raced.looks(batch).max() > 0
    first, second = (
        next(r for r in look if not batch.row_is_tree[r]) for look in look_rows(batch)[:2]
    )
    rest = tuple((row,) for row in range(40) if row not in (first, second))
    crossing = Layout(((int(first), int(second)), *rest), 8, batch.content_hash)
    crossing.check(batch)
    assert not crossing.looks(batch).any()


def test_wrong_layouts_are_refused(batch):
    layout = make_layout(batch, 64, 8)
    first, second, *rest = layout.chunks
    looks = look_rows(batch)
    kinds = [rows[batch.row_is_tree[rows] == kind] for rows in looks[:1] for kind in (False, True)]
    both = [int(rows[0]) for rows in kinds]

    def with_chunk(rows):
        rows = tuple(map(int, rows))
        others = [tuple(row for row in chunk if row not in rows) for chunk in layout.chunks]
        return (rows, *filter(None, others))

    for chunks, named in (
        ((second, *rest), "each once"),
        ((first, first, second, *rest), "each once"),
        (((), first, second, *rest), "each once"),
        (((0.0,), first, second, *rest), "each once"),
        (with_chunk(both), "plain rows or trees"),
    ):
        with pytest.raises(InputError, match=named):
            replace(layout, chunks=chunks).check(batch)
    for tile in (0, -8, 2.5, True, "8"):
        with pytest.raises(InputError, match="tile"):
            replace(layout, tile=tile).check(batch)
    with pytest.raises(InputError, match="other calibration data"):
        layout.check(TokenBatch.from_ids([[1, 2, 3]]))
    for text in (
        "",
        "{",
        "[]",
        "{}",
        '{"chunks": 3, "tile": 8, "content_hash": ""}',
        "[" * 100_000,
    ):
        with pytest.raises(InputError, match="not a layout"):
            Layout.from_json(text)
