"""One block, and whole searches, with random weights at the shapes of LLaMA-3 8B and Qwen3 8B.

What they are measured against is transformers: one forward pass per mask of the model with the
blocks physically removed, timed on a stated sample of the masks, half of it before and half after.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time

import numpy as np
import torch
from gpu_measure import Bench, relative_error
from gpu_watch import failure

import fastprune as fp
from fastprune.models import FusedRunner, open_runner
from fastprune.models.surgery import without
from fastprune.plan.cost import Cost
from fastprune.plan.trie import Units, kept_units, make_trie
from fastprune.testing import SyntheticEvaluator

SHAPES = {
    "LLaMA-3 8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "Qwen3 8B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}
TINY = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
SEQUENCES = 64  # of the goal; one chunk of them is run, and all chunks cost the same
SAMPLED = 4  # masks of the loop that are timed
AGREE = 5e-3  # relative difference between the losses of two bfloat16 runs


def random_model(bench: Bench, name: str, num_layers: int | None = None) -> torch.nn.Module:
    """Made where it runs, in the dtype it runs in: nothing is loaded and nothing is moved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {**SHAPES[name], **bench.pick({}, TINY)}
    shape |= {
        "num_hidden_layers": num_layers or shape["num_hidden_layers"],
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with bench.device:
        hf = AutoModelForCausalLM.from_config(
            config, dtype=bench.dtype, attn_implementation="sdpa"
        ).eval()
    wrong = [
        n
        for n, p in hf.named_parameters()
        if p.device.type != bench.device.type or p.dtype != bench.dtype
    ]
    if wrong:
        raise RuntimeError(f"{wrong[0]} was not made on {bench.device} in {bench.dtype}")
    return hf


def block_flops(config, tokens: int, pairs: int) -> int:
    """FLOPs of one block; pairs: of a query and a key that it sees, over all rows."""
    width, size = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    projections = 2 * width * (2 * heads + 2 * kv_heads) * size
    return tokens * (projections + 6 * width * config.intermediate_size) + 4 * heads * size * pairs


def head_flops(config, positions: int) -> int:
    return 2 * positions * config.hidden_size * config.vocab_size


def causal_pairs(length: int) -> int:
    return length * (length + 1) // 2


# -- one block -------------------------------------------------------------------------------------


def block(bench: Bench, name: str) -> dict:
    """Blocks run one after the other, launch gaps included, against transformers' own layer."""
    rows, length, chained = bench.pick((4, 2048, 10), (1, 9, 1))  # blocks in a row
    hf = bench.model(f"{name}, 2 blocks", lambda: random_model(bench, name, 2))
    model = fp.Model(hf)
    runner, own = FusedRunner(model, "triton"), open_runner(model, "generic")
    ids = bench.integers(hf.config.vocab_size, rows, length)
    flops = block_flops(hf.config, rows * length, rows * causal_pairs(length))
    with model.evaluation():
        state, arguments = runner.open(ids)
        _, own_arguments = own.open(ids)

        def chain(run, arguments, granularity="block", units=(0, 1)):
            def work():
                x = state
                for i in range(chained):
                    x = run(units[i % len(units)], x, arguments, granularity)
                return x

            return work

        error = relative_error(runner.run(0, state, arguments), own.run(0, state, own_arguments))
        ours = chain(runner.run, arguments)
        found = {
            "tokens": rows * length,
            "flops": flops,
            "error": error,
            **_per_block(bench.time(ours, cold=False), chained),
            "host_ms": _host_ms(bench, ours) / chained,  # until the last launch was handed over
            "attention": _per_block(
                bench.time(chain(runner.run, arguments, "sublayer", (0, 2)), cold=False), chained
            ),
            "mlp": _per_block(
                bench.time(chain(runner.run, arguments, "sublayer", (1, 3)), cold=False), chained
            ),
            "transformers": _per_block(
                bench.time(chain(own.run, own_arguments), cold=False), chained
            ),
            "kernels": _profile(bench, ours, chained),
        }
    found["tflops"] = flops / found["ms"] * 1e-9
    return found | bench.against_floor(found["ms"], 0, flops)


def _per_block(timing: dict[str, float], chained: int) -> dict[str, float]:
    return {**timing, "ms": timing["ms"] / chained}


def _host_ms(bench: Bench, work) -> float:
    bench.synchronize()
    started = time.perf_counter()
    work()
    elapsed = time.perf_counter() - started
    bench.synchronize()
    return 1e3 * elapsed


def _profile(bench: Bench, work, chained: int) -> list[list] | str:
    """The kernels that a block's time goes to: [name, launches, milliseconds], greatest first."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if bench.is_cuda else ProfilerActivity.CPU
    try:
        with profile(activities=[activity]) as profiler:
            work()
            bench.synchronize()
        time_of = "self_device_time_total" if bench.is_cuda else "self_cpu_time_total"
        events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, time_of))
        return [
            [e.key[:120], e.count / chained, getattr(e, time_of) / 1e3 / chained]
            for e in events[:20]
        ]
    except (RuntimeError, AttributeError) as error:
        return f"not profiled: {error}"


# -- searches --------------------------------------------------------------------------------------


def evaluator(
    bench: Bench, name: str, objective, progress=None, cache_bytes: int | None = 0
) -> fp.Evaluator:
    """cache_bytes: 0 keeps no states, so that a call repeated costs the same again; None is the
    default cache."""
    hf = bench.model(name, lambda: random_model(bench, name))
    return fp.Evaluator(hf, objective, backend="fused", cache_bytes=cache_bytes, progress=progress)


def chunk_shapes(ev: fp.Evaluator) -> list[list[int]]:
    """Rows and tokens of the chunks into which an evaluator has cut its calibration set."""
    lengths = ev.objective.batch.row_lengths
    return [[len(rows), int(lengths[list(rows)].max())] for rows in ev.layout.chunks]


def pairs(bench: Bench, name: str) -> dict:
    """All pairs of blocks, on as many sequences as run together; as many of the pairs as time
    allows."""
    rows, length = bench.pick((8, 2048), (2, 9))
    hf = bench.model(name, lambda: random_model(bench, name))
    config, vocab = hf.config, hf.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, (rows, length))
    ev = evaluator(bench, name, fp.Perplexity(fp.TokenBatch.from_ids(ids)))
    on_device = torch.from_numpy(ids).to(bench.device)
    units = ev.num_units
    block_cost = block_flops(config, rows * length, rows * causal_pairs(length))
    head_cost = head_flops(config, rows * (length - 1))

    def cost(plan) -> float:
        return plan.unit_runs * block_cost + len(plan.sequences) * head_cost

    dense = np.ones((1, units), dtype=bool)
    ev.score(dense)
    dense_seconds = bench.seconds(lambda: ev.score(dense))
    rate = cost(make_trie(kept_units(dense))) / dense_seconds
    field = list(itertools.combinations(range(units), 2))
    every = max(
        1,
        math.ceil(
            cost(make_trie(kept_units(fp.from_removed(field, units))))
            / rate
            / (0.4 * max(bench.left(), 1))
        ),
    )
    field = field[::every]
    masks = fp.from_removed(field, units)
    plan = make_trie(kept_units(masks))
    flop_ratio = (plan.naive_unit_runs * block_cost + len(masks) * head_cost) / cost(plan)

    sampled = [field[i] for i in np.linspace(0, len(field) - 1, SAMPLED).astype(int)]
    pruned = [without(ev.model, removed) for removed in sampled]

    @torch.inference_mode()
    def one_pass(model) -> float:
        return model(input_ids=on_device, labels=on_device, use_cache=False).loss.item()

    expected = np.array([one_pass(model) for model in pruned])  # also warms up
    differences = np.abs(ev.score(fp.from_removed(sampled, units)) / expected - 1)
    passes = [bench.seconds(lambda m=m: one_pass(m)) for m in pruned[::2]]
    bench.free()
    seconds = bench.seconds(lambda: ev.score(masks))
    passes += [bench.seconds(lambda m=m: one_pass(m)) for m in pruned[1::2]]
    bench.free()
    loop = statistics.median(passes) * len(masks)
    return {
        "blocks": units,
        "sequences": f"{rows} of {length} tokens, of the goal's {SEQUENCES}: one chunk of "
        f"{SEQUENCES // rows}",
        "chunks": chunk_shapes(ev),
        "masks": len(masks),
        "masks_of_the_field": f"1 of {every}" if every > 1 else "all",
        "unit_runs": plan.unit_runs,
        "loop_sample": [list(removed) for removed in sampled],
        "loop_passes_s": passes,
        "loop_s": loop,
        "fastprune_s": seconds,
        "dense_s": dense_seconds,
        "tflops": cost(plan) / seconds * 1e-12,
        "speedup": loop / seconds,
        "flop_ratio": flop_ratio,
        "beyond_sharing": loop / seconds / flop_ratio,
        "greatest_difference": float(differences.max()),
        "agrees": bool(differences.max() <= AGREE),
        "peak_activation_bytes": ev.stats.peak_activation_bytes,
    }


def random_tasks(
    bench: Bench, vocab: int, items: int, trunk: int, choices: int, length: int
) -> fp.Tasks:
    """Questions of `trunk` tokens with choices of `length` tokens, all random."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(items):
        prompt = rng.integers(0, vocab, trunk)
        answers = rng.integers(0, vocab, (choices, length))
        answers[:, 0] = rng.choice(vocab, choices, replace=False)  # the trunk ends with the prompt
        rows.append([(np.concatenate([prompt, answer]), trunk) for answer in answers])
    return fp.Tasks(
        batch=fp.TokenBatch.from_continuations(rows),
        question=np.repeat(np.arange(items), choices),
        answer=np.arange(items) * choices,
        choice_characters=np.full(items * choices, length),
        choice_bytes=np.full(items * choices, length),
    )


def margin(bench: Bench, name: str) -> dict:
    """Masks one by one, so that no prefix is shared: what trees, answer-only heads and kernels give
    by themselves."""
    shape = items, trunk, choices, length = bench.pick((128, 100, 4, 20), (3, 5, 2, 3))
    hf = bench.model(name, lambda: random_model(bench, name))
    tasks = random_tasks(bench, hf.config.vocab_size, *shape)
    ev = evaluator(bench, name, fp.TaskMargin(tasks))
    rng = np.random.default_rng(1)
    gone = bench.pick(7, 1)
    sampled = [
        tuple(sorted(rng.choice(ev.num_units, gone, replace=False).tolist()))
        for _ in range(SAMPLED)
    ]
    masks = fp.from_removed(sampled, ev.num_units)
    pruned = [without(ev.model, removed) for removed in sampled]
    # the same questions, one sequence per choice
    batch, width = tasks.batch, trunk + length
    tree = torch.from_numpy(batch.ids.reshape(items, trunk + choices * length))
    prompts = tree[:, None, :trunk].expand(items, choices, trunk)
    sequences = torch.cat([prompts, tree[:, trunk:].view(items, choices, length)], dim=2).view(
        -1, width
    )
    sequences = sequences.to(bench.device)

    @torch.inference_mode()
    def one_pass(model) -> float:
        found = []
        for part in sequences.split(bench.pick(128, 4)):
            logits = model(input_ids=part, use_cache=False).logits[:, trunk - 1 : -1].float()
            found.append(
                torch.log_softmax(logits, -1).gather(2, part[:, trunk:, None]).mean((1, 2))
            )
        chosen = torch.cat(found).view(items, choices)
        return (chosen[:, 1:].mean(1) - chosen[:, 0]).mean().item()

    expected = np.array([one_pass(model) for model in pruned])
    scores = np.concatenate([ev.score(mask[None]) for mask in masks])
    loop = [bench.seconds(lambda m=m: one_pass(m)) for m in pruned[::2]]
    bench.free()
    ours = [bench.seconds(lambda m=m: ev.score(m[None])) for m in masks]
    loop += [bench.seconds(lambda m=m: one_pass(m)) for m in pruned[1::2]]
    bench.free()
    config, kept = hf.config, ev.num_units - gone
    tree_pairs = causal_pairs(trunk) + choices * (length * trunk + causal_pairs(length))
    positions = items * (1 + choices * (length - 1))
    tree_flops = kept * block_flops(config, batch.num_tokens, items * tree_pairs) + head_flops(
        config, positions
    )
    apart = items * choices
    apart_flops = kept * block_flops(config, apart * width, apart * causal_pairs(width))
    apart_flops += head_flops(config, apart * width)
    seconds, loop_seconds = statistics.median(ours), statistics.median(loop)
    # margins of random weights are near 0: their differences are held against the likelihoods they
    # are made of
    differences = np.abs(scores - expected) / math.log(config.vocab_size)
    return {
        "items": f"{items} x {choices} choices, questions of {trunk} tokens, choices of {length}",
        "removed": [list(removed) for removed in sampled],
        "transformers_s": loop_seconds,
        "fastprune_s": seconds,
        "tflops": tree_flops / seconds * 1e-12,
        "speedup": loop_seconds / seconds,
        "flop_ratio": apart_flops / tree_flops,
        "greatest_difference": float(differences.max()),
        "agrees": bool(differences.max() <= AGREE),
    }


class OutOfTime(TimeoutError):
    pass


class _Rounds(SyntheticEvaluator):
    """Counts the unit runs that a search needs where every state is kept, by drawn losses."""

    def __init__(self, num_units: int):
        super().__init__(num_units)
        self.pairs[:] = 0
        self._prefixes: set[Units] = set()

    def score(self, masks=None, **options) -> np.ndarray:
        for sequence in kept_units(masks):
            self._prefixes.update(sequence[:i] for i in range(1, len(sequence) + 1))
        self.stats = Cost(unit_runs=len(self._prefixes))
        return super().score(masks, **options)


class _Clock:
    """Progress that counts the unit runs of chunks, and ends a search when time runs out."""

    def __init__(self, bench: Bench):
        self._bench, self._reserve = bench, bench.pick(15, -1)
        self.start()

    def start(self) -> None:
        self._started, self._earlier, self._now = time.perf_counter(), 0, 0

    def __call__(self, event: fp.ProgressEvent) -> None:
        if event.done < self._now:
            self._earlier += self._now
        self._now = event.done
        if self._bench.left() < self._reserve:
            self._bench.synchronize()  # the counted work was only handed over
            raise OutOfTime(f"after {self.seconds:.0f} s and {self.done} unit runs of chunks")

    @property
    def done(self) -> int:
        return self._earlier + self._now

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started


def beam(bench: Bench, name: str) -> dict:
    """Whole searches with the prefix cache.

    The race drops masks by the divergence, since random weights answer all questions alike: their
    margins are noise, and no mask is surely beaten. The same search without racing says whether the
    race removed the same blocks. By the margin, whose noise makes the search go everywhere, most
    states are run; where time runs out, its seconds are extrapolated by the unit runs.
    """
    shape = items, trunk, choices, length = bench.pick((128, 100, 4, 6), (3, 5, 2, 2))
    hf = bench.model(name, lambda: random_model(bench, name))
    tasks = random_tasks(bench, hf.config.vocab_size, *shape)
    options = {"num_remove": bench.pick(7, 2), "beam_width": bench.pick(5, 2)}
    clock = _Clock(bench)

    def make(objective) -> fp.Evaluator:
        ev = evaluator(bench, name, objective(tasks), clock, cache_bytes=None)
        ev.score(np.ones((1, ev.num_units), dtype=bool))  # kernels for these shapes are compiled
        return ev

    def search(ev: fp.Evaluator, racing: float | None = None) -> dict:
        clock.start()
        try:
            result = fp.run_search(ev, "beam", racing=racing, **options)
        except OutOfTime as error:
            return failure(error)
        finally:
            bench.free()
        return {
            "seconds": result.cost.seconds,
            "masks": result.evaluations,
            "unit_runs": result.cost.unit_runs,
            "naive_unit_runs": result.cost.naive_unit_runs,
            "decided_early": result.decided_early,
            "cache_hits": ev.stats.cache_hits,
            "cache_bytes": ev.stats.cache_bytes,
            "removed": list(result.removed),
        }

    found: dict = {
        "items": f"{items} x {choices} choices, questions of {trunk} tokens, choices of {length}",
        **options,
    }
    found["raced"] = search(make(fp.KLDivergence), racing=0.99)
    bench.save("beam", {"model": name, **found})
    ev = make(fp.TaskMargin)
    chunks, counted = chunk_shapes(ev), fp.run_search(_Rounds(ev.num_units), "beam", **options)
    found |= {"chunks": chunks, "blocks": ev.num_units}
    found["expected_unit_runs"] = counted.cost.unit_runs
    whole = search(ev)
    if "failed" in whole:
        every = found["expected_unit_runs"] * len(chunks)
        found["extrapolated"] = f"{whole['failed']}, of about {every:.0f}"
        found["seconds"] = clock.seconds * every / max(clock.done, 1)
    else:
        found |= whole
        bench.save("beam", {"model": name, **found})
        del ev
        found["unraced"] = search(make(fp.KLDivergence))
        removed = found["unraced"].get("removed")
        if removed is not None and "removed" in found["raced"]:
            found["raced"]["same_removed"] = found["raced"]["removed"] == removed
    tree_pairs = causal_pairs(trunk) + choices * (length * trunk + causal_pairs(length))
    tokens = items * (trunk + choices * length)
    unit_runs = found.get("unit_runs", found["expected_unit_runs"])
    flops = unit_runs * block_flops(hf.config, tokens, items * tree_pairs)
    floor_ms = bench.floor_ms(0, flops)  # of the blocks alone
    return found if floor_ms is None else {**found, "floor_s": floor_ms / 1e3}
