"""Weights that stay in their files: the bits of the in-memory run, counted loads, limits, changes,
overlap."""

import os
import re
import threading

import numpy as np
import pytest
import torch
from families import build, num_blocks, random_rows, some_masks
from helpers import make_tasks, smallest_budget

import fastprune as fp
from fastprune.models import open_runner
from fastprune.models.verify import check_trees

LENGTHS = [23, 9, 17, 23, 16, 9, 21, 12]


def save(hf, folder, **options):
    hf.save_pretrained(folder, **options)
    return folder


def limits(folder, **options) -> tuple[int, int]:
    """The smallest limit that works, and the bytes of a block, as the refusal of one byte names
    them."""
    with pytest.raises(fp.InputError, match="the smallest that works") as error:
        fp.load_model(folder, weights_bytes=1, **options)
    block, least = re.search(
        r"a block (\d+); the smallest that works is (\d+), not 1", str(error.value)
    ).groups()
    return int(least), int(block)


def streamed(folder, blocks: int, **options) -> fp.Model:
    """The model with room for so many blocks."""
    least, block = limits(folder, **options)
    return fp.load_model(folder, weights_bytes=least + (blocks - 1) * block, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 5 blocks in several files."""
    return make_folder("llama", tmp_path_factory.mktemp("llama"), max_shard_size="40KB")


def make_folder(family: str, folder, **options):
    return save(build(family), folder, **options)


def perplexity(model) -> fp.Perplexity:
    return fp.Perplexity(fp.TokenBatch.from_ids(random_rows(model.vocab_size, LENGTHS)))


FAMILIES = ["cohere", "gemma2-sdpa", "gemma3", "gpt2", "granite", "llama-tied", "mixtral", "olmo2"]
FAMILIES += ["qwen3-moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_the_bits_of_the_model_in_memory(family, tmp_path):
    make_folder(family, tmp_path)
    whole, model = fp.load_model(tmp_path), streamed(tmp_path, 2)
    assert len(model.weights.bands) == model.num_blocks
    masks = some_masks(model.num_blocks, 30, seed=1)
    ev = fp.Evaluator(model, perplexity(model), cache_bytes=0)
    assert np.array_equal(ev.score(masks), fp.Evaluator(whole, perplexity(whole)).score(masks))
    assert model.digest == whole.digest


@pytest.mark.parametrize("blocks", [1, 4, 5])
@pytest.mark.parametrize("backend", ["generic", "fused"])
def test_bits_counts_and_loads(folder, backend, blocks):
    whole, model = fp.load_model(folder), streamed(folder, blocks)
    masks = some_masks(5, 40, seed=2)
    expected = fp.Evaluator(whole, perplexity(whole), backend, cache_bytes=0)
    ev = fp.Evaluator(model, perplexity(model), backend, cache_bytes=0)
    assert len(model.weights.bands) == {1: 5, 4: 3, 5: 1}[blocks]
    assert np.array_equal(ev.score(masks), expected.score(masks))
    assert ev.stats.unit_runs == expected.stats.unit_runs
    assert ev.stats.weight_loads <= 5  # each block once, but for those that were still there
    before = ev.stats.weight_loads
    ev.score(masks)
    assert ev.stats.weight_loads - before == {1: 5, 4: 2, 5: 0}[blocks]
    assert ev.stats.weight_bytes == ev.stats.weight_loads * sum(
        p.nbytes for p in whole.layers[0].parameters()
    )


@pytest.mark.parametrize(("family", "granularity"), [("llama", "block"), ("gpt-neox", "sublayer")])
def test_caches_stores_races_and_sequences(family, granularity, tmp_path):
    make_folder(family, tmp_path)
    whole, model = fp.load_model(tmp_path), streamed(tmp_path, 2)
    tasks = [
        make_tasks(m.vocab_size, [(6, (2, 3)), (9, (1, 4, 2)), (5, (2, 2))] * 14)
        for m in (whole, model)
    ]
    options = {"granularity": granularity, "cache_bytes": 8 << 20, "backend": "generic"}
    resident = fp.Evaluator(whole, fp.TaskMargin(tasks[0]), **options)
    ev = fp.Evaluator(model, fp.TaskMargin(tasks[1]), store=tmp_path / "sums", **options)
    masks = some_masks(ev.num_units, 24, seed=3)
    for part in (masks[:8], masks[4:], masks):  # the prefix cache, then the store
        assert np.array_equal(ev.score(part), resident.score(part))
    assert ev.stats.store_hits
    assert sum(ev.stats.cache_hits.values())
    another = some_masks(ev.num_units, 20, seed=4)
    assert np.array_equal(ev.race(another, keep=2).losses, resident.race(another, keep=2).losses)
    last = ev.num_units - 1
    sequences = [(0, 1, 1, 2), (last, 0, last), (2, 1, 0, 2), (0, 1, 2), (last,), (0, 0, 0, 0)]
    assert np.array_equal(ev.score(sequences=sequences), resident.score(sequences=sequences))
    with_store = fp.Evaluator(whole, fp.TaskMargin(tasks[0]), store=tmp_path / "sums", **options)
    with_store.score(masks)
    assert (
        with_store.stats.unit_runs == 0
    )  # what a streamed run has kept serves the model in memory


def test_divergence_from_the_dense_model(folder):
    whole, model = fp.load_model(folder), streamed(folder, 2)
    masks = some_masks(5, 12, seed=5)
    found, expected = (
        fp.Evaluator(
            m, fp.KLDivergence(fp.TokenBatch.from_ids(random_rows(m.vocab_size, LENGTHS)))
        ).score(masks)
        for m in (model, whole)
    )
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("disk", [False, True])
def test_a_small_budget_makes_groups(folder, disk, tmp_path):
    """If the states between bands do not fit, chunks go in groups, then masks in parts; or the
    states go to a disk."""
    whole, model = fp.load_model(folder), streamed(folder, 2)
    masks = some_masks(5, 40, seed=6)

    def make(of, memory_bytes, **options):
        return fp.Evaluator(of, perplexity(of), memory_bytes=memory_bytes, cache_bytes=0, **options)

    budget = smallest_budget(lambda memory_bytes: make(whole, memory_bytes))
    ev = make(model, budget, cache_dir=tmp_path if disk else None)
    assert np.array_equal(ev.score(masks), make(whole, budget).score(masks))
    assert ev.stats.peak_activation_bytes <= budget
    assert ev.stats.weight_loads > 5 or disk


def test_widened_weights(tmp_path):
    hf = build("llama", torch.bfloat16)
    save(hf, tmp_path)
    whole = fp.load_model(tmp_path, dtype="float32")
    model = streamed(tmp_path, 2, dtype="float32")
    masks = some_masks(5, 12, seed=7)
    found, expected = (fp.Evaluator(m, perplexity(m)).score(masks) for m in (model, whole))
    assert np.array_equal(found, expected)


def test_probes(folder):
    whole, model = fp.load_model(folder), streamed(folder, 4)
    found, expected = (fp.Evaluator(m, perplexity(m)) for m in (model, whole))
    assert np.array_equal(found.similarity(), expected.similarity())
    assert np.array_equal(found.angular_distance(), expected.angular_distance())
    assert np.array_equal(found.unit_gradients(), expected.unit_gradients())


def test_reading_goes_on_while_a_band_computes(folder, monkeypatch):
    """A file so slow that it gives the next band's bytes only after a unit of this one has run, and
    a run so slow that it goes on only after reading of the next band has begun: either alone would
    wait for the other for ever."""
    model = streamed(folder, 2)
    ev = fp.Evaluator(model, perplexity(model), cache_bytes=0)  # leaves the first block loaded
    ran, began, preadv = threading.Event(), threading.Event(), os.preadv

    def slow(*arguments):
        began.set()
        assert ran.wait(timeout=60), "nothing computes while the next band is read"
        return preadv(*arguments)

    def progress(event):
        ran.set()
        assert began.wait(timeout=60), "nothing is read while a band computes"

    monkeypatch.setattr(os, "preadv", slow)
    ev.progress = progress
    ev.score(some_masks(5, 12, seed=8))
    assert ev.stats.weight_loads >= 3


def test_a_limit_below_one_block(folder):
    least, _ = limits(folder)
    with pytest.raises(fp.InputError, match=f"the smallest that works is {least}, not {least - 1}"):
        fp.load_model(folder, weights_bytes=least - 1)
    assert fp.load_model(folder, weights_bytes=least).weights.room.places == 1
    with pytest.raises(fp.InputError, match="weights_bytes must be a number of bytes"):
        fp.load_model(folder, weights_bytes=-3)
    with pytest.raises(fp.InputError, match="this one is in memory"):
        fp.load_model(build("llama"), weights_bytes=1 << 30)


@pytest.mark.parametrize("change", ["rewritten", "replaced", "gone", "shorter"])
def test_a_checkpoint_that_changes(change, tmp_path):
    make_folder("llama", tmp_path)
    model = streamed(tmp_path, 2)
    ev = fp.Evaluator(model, perplexity(model), cache_bytes=0)
    ev.score(some_masks(5, 12, seed=9))
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    if change == "rewritten":
        path.write_bytes(data[:-1] + b"\1")
    elif change == "gone":
        path.unlink()
    elif change == "shorter":
        path.write_bytes(data[:-1])
    else:
        (tmp_path / "other").write_bytes(data)
        (tmp_path / "other").rename(path)
    with pytest.raises(fp.InputError, match=r"model\.safetensors: .*while weights stay in it"):
        ev.score(some_masks(5, 12, seed=9))


def test_how_often_a_model_is_read_before_the_first_mask(folder):
    """As docs/scale.md counts it: to prove it, then trees, then the fused path on short rows and on
    the longest one, and a block to measure; each once."""
    model = streamed(folder, 1)
    assert model.weights.loads == 5
    check_trees(open_runner(model, "generic"))
    assert model.weights.loads == 10
    fp.Evaluator(model, perplexity(model), "fused", cache_bytes=0)
    assert model.weights.loads == 21
    check_trees(open_runner(model, "generic"))
    fp.Evaluator(model, perplexity(model), "fused", cache_bytes=0)
    assert model.weights.loads <= 22


def test_the_hash_is_kept_beside_the_files(tmp_path):
    make_folder("llama", tmp_path)
    first = streamed(tmp_path, 2)
    known = first.digest
    second = streamed(tmp_path, 2)
    before = second.weights.loads
    assert second.digest == known
    assert second.weights.loads == before  # not read again
    hf = build("llama", seed=5)
    save(hf, tmp_path)
    assert streamed(tmp_path, 2).digest == fp.load_model(tmp_path).digest != known


def test_what_needs_the_whole_model_says_so(folder, tmp_path):
    model = streamed(folder, 2)
    with pytest.raises(fp.InputError, match="weights are streamed"):
        fp.export(model, tmp_path / "out", removed=[1])
    with pytest.raises(fp.InputError, match="weights are streamed"), fp.masked(model, [1]):
        pass
    assert not (tmp_path / "out").exists()
    assert num_blocks(model.hf) == 5
