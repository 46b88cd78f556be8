"""Budgets on the pruned model: units of like cost are a number of units, and unlike ones are
searched up to the budget and no further."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from families import build, random_rows
from hypothesis import given
from hypothesis import strategies as st

import fastprune as fp
from fastprune.search import ALGORITHMS, find_algorithm
from fastprune.testing import SyntheticEvaluator

ABLE = ["one_shot", "greedy", "beam", "genetic", "evopress", "exhaustive", "random"]
UNLIKE = [5, 2, 2, 1, 3, 3, 1, 4, 2]
OPTIONS = {"bayesian": {"trials": 12}}

REMOVING = sorted(name for name, known in ALGORITHMS.items() if not known.over_sequences)


def complete_subsets(costs, limit: float) -> list[tuple[int, ...]]:
    """Every subset that saves enough, and does not without any one of its units."""
    total = 10 + sum(costs)

    def meets(subset) -> bool:
        return total - sum(costs[unit] for unit in subset) <= limit

    return [
        subset
        for size in range(len(costs) + 1)
        for subset in itertools.combinations(range(len(costs)), size)
        if meets(subset) and not any(meets([*subset[:i], *subset[i + 1 :]]) for i in range(size))
    ]


@pytest.mark.parametrize("name", REMOVING)
@pytest.mark.parametrize(("amount", "count"), [("75%", 5), (15.5, 4), (1e6, 0)])
def test_equal_units_are_a_number_of_units(name, amount, count):
    """19 parameters, 1 a unit."""
    runs = []
    for arguments in ({"num_remove": count}, {"budget": fp.Budget(params=amount)}):
        evaluator = SyntheticEvaluator(9, seed=3, num_samples=20)
        result = fp.run_search(evaluator, name, **arguments, **OPTIONS.get(name, {}))
        runs.append((result.removed, result.loss, result.history, evaluator.calls))
    assert runs[0] == runs[1]
    assert len(runs[0][0]) == count


@pytest.mark.parametrize("name", ABLE)
@pytest.mark.parametrize("limit", [11.0, 14.0, 20.5, 27.0])
def test_unlike_units_go_up_to_the_budget_and_no_further(name, limit):
    evaluator = SyntheticEvaluator(9, seed=4, costs=UNLIKE)
    result = fp.run_search(evaluator, name, budget=fp.Budget(params=limit))
    every = complete_subsets(UNLIKE, limit)
    assert result.removed in every
    assert result.loss == evaluator.loss(np.array(result.removed))
    assert result.costs["after"] == 33 - sum(UNLIKE[unit] for unit in result.removed)
    if name == "exhaustive":
        assert [subset for subset, _ in result.history] == sorted(every)
        assert result.loss == min(evaluator.loss(np.array(subset)) for subset in every)


def test_a_wide_beam_finds_the_optimum_and_every_size_contains_the_smaller():
    evaluator = SyntheticEvaluator(9, seed=5, costs=UNLIKE)
    budget = fp.Budget(params=20)
    optimum = fp.run_search(evaluator, "exhaustive", budget=budget)
    result = fp.run_search(evaluator, "beam", budget=budget, beam_width=200)
    assert result.removed == optimum.removed
    losses = dict(result.history)
    for before, after in itertools.pairwise(result.path):
        assert {*before[0]} < {*after[0]}
        assert len(after[0]) == len(before[0]) + 1
    for removed, loss, cost in result.path:
        assert loss == losses[removed] == evaluator.loss(np.array(removed))
        assert cost == 33 - sum(UNLIKE[unit] for unit in removed)
    assert result.path[-1][0] == result.removed


def test_greedy_takes_the_step_of_least_increase_for_what_it_saves():
    evaluator = SyntheticEvaluator(4, costs=[4, 1, 2, 1])
    evaluator.linear[:], evaluator.pairs[:] = [0.8, 0.3, 0.5, 0.9], 0.0
    result = fp.run_search(evaluator, "greedy", budget=fp.Budget(params=11))
    assert [removed for removed, _, _ in result.path] == [(0,), (0, 2), (0, 1, 2)]


def test_units_not_needed_are_put_back():
    """Unit 0 alone is enough, and goes after 1 and 2."""
    evaluator = SyntheticEvaluator(4, costs=[5, 1, 1, 1])
    evaluator.linear[:], evaluator.pairs[:] = [1.0, 0.1, 0.15, 9.0], 0.0
    for name in ("greedy", "one_shot"):
        result = fp.run_search(evaluator, name, budget=fp.Budget(params=13))
        assert result.removed == (0,)


def test_the_path_of_a_number_of_units_is_greedys_own():
    evaluator = SyntheticEvaluator(8, seed=2)
    result = fp.run_search(evaluator, "greedy", 3)
    for size, (removed, loss, cost) in enumerate(result.path, 1):
        assert removed == fp.run_search(evaluator, "greedy", size).removed
        assert (loss, cost) == (dict(result.history)[removed], 18 - size)
    assert not fp.run_search(evaluator, "random", 3).path


@pytest.mark.parametrize("name", [name for name in REMOVING if name not in ABLE])
def test_others_say_that_they_cannot(name):
    assert not find_algorithm(name).limits
    evaluator = SyntheticEvaluator(9, costs=UNLIKE)
    with pytest.raises(fp.InputError, match=f"{name} removes a number of units and cannot keep"):
        fp.run_search(evaluator, name, budget=fp.Budget(params=20))
    assert not evaluator.calls


@pytest.mark.parametrize("num_samples", [64, 4])  # 4 are too few to race
def test_searches_that_weigh_unlike_units_do_not_race(num_samples):
    evaluator = SyntheticEvaluator(9, costs=UNLIKE, num_samples=num_samples)
    for name in ("greedy", "beam", "one_shot"):
        with pytest.raises(fp.InputError, match="cannot race under a budget of units"):
            fp.run_search(evaluator, name, budget=fp.Budget(params=20), racing=0.99)
    result = fp.run_search(evaluator, "random", budget=fp.Budget(params=20), racing=0.99)
    assert (result.racing, result.decided_early > 0) == (
        (0.99, True) if num_samples > 4 else (None, False)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": -1}, "params must be a number of at least 0, not -1"),
        ({"bytes": math.inf}, "bytes must be a number of at least 0, not inf"),
        ({"latency_ms": math.nan}, "latency_ms must be a number"),
        ({"params": 10**400}, "params must be a number"),
        ({"params": "101%"}, 'params must be a number of at least 0 or a share such as "75%"'),
        ({"params": "-5%"}, "params must be a number of at least 0 or a share"),
        ({"params": "many"}, "params must be a number of at least 0 or a share"),
        ({"params": True}, "params must be a number"),
        ({}, "a budget has one of params, bytes, kv_bytes, latency_ms, not none"),
        ({"params": 1, "bytes": 2}, "not params and bytes"),
        ({"latency_ms": 1, "batch_size": 0}, "batch_size must be an integer from 1"),
        ({"latency_ms": 1, "seq_len": 10**9}, "seq_len must be an integer from 1"),
    ],
)
def test_wrong_budgets(arguments, message):
    with pytest.raises(fp.InputError, match=message):
        fp.Budget(**arguments)


def test_searches_refuse_what_no_removal_meets():
    evaluator = SyntheticEvaluator(4)
    with pytest.raises(fp.InputError, match=r"params=10 cannot be met: .* has 11 parameters"):
        fp.run_search(evaluator, "greedy", budget=fp.Budget(params=10))
    with pytest.raises(fp.InputError, match="a share of the whole model is written"):
        fp.run_search(evaluator, "greedy", budget=fp.Budget(params=0.9))
    with pytest.raises(fp.InputError, match=r"params=12 cannot be met: .* has 13 parameters"):
        fp.run_search(evaluator, "greedy", budget=fp.Budget(params=12), protect=(0, 2, 3))
    with pytest.raises(fp.InputError, match=r"num_remove is missing: .* or give a budget"):
        fp.run_search(evaluator, "greedy")
    with pytest.raises(fp.InputError, match="num_remove and budget are two sizes; give one"):
        fp.run_search(evaluator, "greedy", 2, budget=fp.Budget(params=12))
    with pytest.raises(fp.InputError, match="budget must be a Budget"):
        fp.run_search(evaluator, "greedy", budget="75%")
    assert not evaluator.calls


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("params=75%", "params", "75%"),
        ("params = 100M", "params", 100e6),
        ("bytes=1.5GB", "bytes", 1.5e9),
        ("kv_bytes=64Ki", "kv_bytes", 65536.0),
        ("latency-ms=12.5", "latency_ms", 12.5),
        ("latency_ms=1e-05", "latency_ms", 1e-5),
        ("bytes=1e+12", "bytes", 1e12),
    ],
)
def test_budgets_as_text(text, kind, amount):
    budget = fp.Budget.parse(text)
    assert (budget.kind, budget.amount) == (kind, amount)


SHARES = st.decimals(0, 100, places=3).map(lambda share: f" {share} % ")
NUMBERS = st.floats(0, allow_infinity=False) | st.integers(0, 10**30) | st.just(-0.0)


@given(
    st.sampled_from(["params", "bytes", "kv_bytes", "latency_ms"]),
    SHARES | NUMBERS,
    st.integers(1, 10**9 - 1),
    st.none() | st.integers(1, 10**9 - 1),
)
def test_the_text_of_a_budget_is_that_budget(kind, amount, batch_size, seq_len):
    budget = fp.Budget(**{kind: amount}, batch_size=batch_size, seq_len=seq_len)
    again = fp.Budget.parse(str(budget))
    assert again == budget
    assert str(again) == str(budget)
    assert again.limit(whole=3e6) == budget.limit(whole=3e6)


@pytest.mark.parametrize(
    "text", ["75%", "parameters=3", "params=", "params=-3", "params=3Q", "params=1e999"]
)
def test_wrong_texts(text):
    with pytest.raises(fp.InputError):
        fp.Budget.parse(text)


def evaluator_of(hf, granularity: str = "block") -> fp.Evaluator:
    rows = random_rows(hf.config.vocab_size, [9, 7])
    batch = fp.TokenBatch.from_ids(rows)
    return fp.Evaluator(hf, fp.Perplexity(batch), granularity=granularity)


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_costs_are_those_of_the_model_without_the_blocks(family):
    hf = build(family)
    ev = evaluator_of(hf)
    params, sizes, cache = (ev.unit_costs(kind) for kind in ("params", "bytes", "kv_bytes"))
    with fp.masked(ev.model, (1, 3)) as pruned:
        weights = list(pruned.parameters())  # tied ones once
        assert params.after((1, 3)) == sum(w.numel() for w in weights)
        assert sizes.after((1, 3)) == sum(w.nbytes for w in weights)
    config = hf.config
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim * 4
    assert cache.own == (keys_and_values,) * config.num_hidden_layers


def test_weights_that_blocks_share_go_with_the_last_of_them():
    hf = build("llama")
    hf.model.layers[3].mlp = hf.model.layers[1].mlp
    costs = evaluator_of(hf).unit_costs("params")
    mlp = sum(weights.numel() for weights in hf.model.layers[1].mlp.parameters())
    block = sum(weights.numel() for weights in hf.model.layers[0].parameters())
    assert costs.total == sum(weights.numel() for weights in hf.parameters())
    assert costs.own[1] == costs.own[3] == block - mlp
    assert costs.total - costs.after((1, 3)) == 2 * block - mlp
    assert costs.total - costs.after((0, 1)) == 2 * block - mlp


def test_a_budget_of_sublayers_on_a_model():
    ev = evaluator_of(build("llama"), "sublayer")
    costs = ev.unit_costs("params")
    assert costs.own[0] != costs.own[1]
    limit = costs.total - 2.5 * costs.own[1]
    result = fp.run_search(ev, "greedy", budget=fp.Budget(params=limit))
    assert costs.after(result.removed) <= limit
    for unit in result.removed:
        assert costs.after({*result.removed} - {unit}) > limit
    assert result.loss == ev.score(result.mask[None])[0]
    cached = fp.run_search(ev, "greedy", budget=fp.Budget(kv_bytes="60%"))
    assert len(cached.removed) == 2  # of 5 attentions
    assert not any(unit % 2 for unit in cached.removed)  # no MLP has a cache


def test_a_budget_of_time_is_measured(monkeypatch):
    """The clock ticks when it is read, so a unit and a whole pass take a tick each."""
    tick = 2.0**-9
    monkeypatch.setattr("time.perf_counter", itertools.count(0.0, tick).__next__)
    ev = evaluator_of(build("llama"))
    costs = ev.unit_costs("latency_ms", batch_size=2, seq_len=8)
    assert costs.own == (1000 * tick,) * ev.num_units
    assert costs.total == sum(costs.own)
    limit = costs.total - 1.5 * costs.own[0]
    budget = fp.Budget(latency_ms=limit, batch_size=2, seq_len=8)
    assert len(fp.run_search(ev, "one_shot", budget=budget).removed) == 2
    with pytest.raises(fp.InputError, match="seq_len 999 is longer than the model's 128"):
        ev.unit_costs("latency_ms", seq_len=999)
    with pytest.raises(fp.InputError, match="kind must be one of params, bytes"):
        ev.unit_costs("watts")
