"""Plans: as many unit runs as there are distinct prefixes, and steps that really produce every mask."""

import itertools

import numpy as np
import pytest

from fastprune.plan import ROOT, kept_units, make_plan, max_slots


def count_prefixes(masks) -> int:
    """Distinct non-empty prefixes of the sequences of kept units, one by one."""
    prefixes = set()
    for mask in masks:
        kept = tuple(np.flatnonzero(mask))
        prefixes.update(kept[: i + 1] for i in range(len(kept)))
    return len(prefixes)


def simulate(plan) -> dict[int, tuple[int, ...]]:
    """Execute the steps on tuples of units in place of states; the sequence that each mask ends with."""
    slots: list[tuple[int, ...] | None] = [None] * plan.num_slots
    finished = {}
    for number, step in enumerate(plan.steps):
        if step.source == ROOT:
            assert number == 0  # the embeddings are not kept: only the first step may read them
            state = ()
        else:
            state = slots[step.source]
            assert state is not None, "reads a slot that holds nothing"
            if step.last_use:
                slots[step.source] = None
        state = (*state, *step.units)
        if step.end >= 0:
            assert step.end not in finished
            finished[step.end] = state
        if step.target >= 0:
            assert slots[step.target] is None, "overwrites a state that is still needed"
            slots[step.target] = state
    assert slots == [None] * plan.num_slots, "holds a state that nobody reads"
    return finished


def random_fields():
    rng = np.random.default_rng(0)
    for num_units in (1, 2, 5, 8, 9, 17, 33):
        for count in (1, 2, 7, 40, 150):
            for share in (0.1, 0.5, 0.9):
                yield rng.random((count, num_units)) < share
    for num_units in (4, 7):
        yield np.array(list(itertools.product([False, True], repeat=num_units)))
        yield np.zeros((3, num_units), dtype=bool)
        yield np.ones((3, num_units), dtype=bool)
        yield np.tri(num_units, dtype=bool)
        yield np.triu(np.ones((num_units, num_units), dtype=bool))
        yield np.zeros((0, num_units), dtype=bool)
    yield np.zeros((2, 0), dtype=bool)


@pytest.mark.parametrize("masks", list(random_fields()), ids=lambda masks: "x".join(map(str, masks.shape)))
def test_steps_produce_every_mask_with_the_least_work(masks):
    original = masks.copy()
    plan = make_plan(kept_units(masks))
    assert np.array_equal(masks, original)
    assert plan.layer_runs == count_prefixes(masks) == sum(len(step.units) for step in plan.steps)
    assert plan.naive_layer_runs == masks.sum()
    assert len(set(plan.sequences)) == len(plan.sequences) == len({m.tobytes() for m in masks})
    assert [plan.sequences[i] for i in plan.index] == [tuple(np.flatnonzero(mask)) for mask in masks]

    finished = simulate(plan)
    assert finished == dict(enumerate(plan.sequences))
    assert plan.num_slots <= max_slots(masks.shape[1], len(plan.sequences))
    targets = {step.target for step in plan.steps if step.target >= 0}
    assert targets == set(range(plan.num_slots))


def test_slots_of_all_masks_grow_with_depth_only():
    """All 2^n masks need about n slots, not one for each of the 2^n states."""
    for num_units in (3, 6, 10):
        plan = make_plan(kept_units(np.array(list(itertools.product([False, True], repeat=num_units)))))
        assert plan.num_slots <= num_units + 1


@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_masks_does_not_change_the_plan(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((60, 12)) < 0.6
    plan, shuffled = make_plan(kept_units(masks)), make_plan(kept_units(masks[rng.permutation(60)]))
    assert plan.steps == shuffled.steps
    assert plan.sequences == shuffled.sequences


def test_ten_thousand_masks_of_eighty_units():
    masks = np.random.default_rng(1).random((10_000, 80)) < 0.9
    plan = make_plan(kept_units(masks))
    assert plan.layer_runs == count_prefixes(masks)
    assert plan.num_slots <= max_slots(80, len(plan.sequences)) <= 14


@pytest.mark.parametrize("seed", range(4))
def test_sequences_that_repeat_and_reorder(seed):
    rng = np.random.default_rng(seed)
    sequences = [tuple(rng.integers(0, 4, rng.integers(0, 9)).tolist()) for _ in range(120)]
    plan = make_plan(sequences)
    prefixes = {sequence[: i + 1] for sequence in sequences for i in range(len(sequence))}
    assert plan.layer_runs == len(prefixes)
    assert plan.naive_layer_runs == sum(map(len, sequences))
    assert [plan.sequences[i] for i in plan.index] == sequences
    assert simulate(plan) == dict(enumerate(plan.sequences))
    assert plan.num_slots <= max_slots(8, len(plan.sequences))
