"""Optuna by ask and tell in batches, against optuna's own loop."""

import numpy as np
import pytest
from families import build, random_rows

import fastprune as fp

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.ERROR)

from fastprune.integrations.optuna import optimize, suggest_removed  # noqa: E402 (after the check)

PRUNED, FAIL, COMPLETE = (optuna.trial.TrialState[name] for name in ("PRUNED", "FAIL", "COMPLETE"))


@pytest.fixture(scope="module")
def hf():
    return build("llama")


def evaluator(hf, **options) -> fp.Evaluator:
    return fp.Evaluator(
        hf,
        fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [9] * 6))),
        **options,
    )


def own_loop(ev, sampler, num_remove: int, n_trials: int):
    """As optuna's documentation writes it: one trial is asked for, scored, told."""

    def objective(trial):
        removed = suggest_removed(trial, ev.num_units, num_remove)
        return float(ev.score(fp.from_removed([removed], ev.num_units))[0])

    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=n_trials)
    return study


def outcomes(study) -> list:
    return [(trial.state, trial.value, trial.params) for trial in study.trials]


@pytest.mark.parametrize("batch_size", [1, 5, 40])
def test_random_trials_are_those_of_optunas_loop_whatever_the_batch(hf, batch_size):
    ev, other = evaluator(hf), evaluator(hf)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    optimize(study, ev, num_remove=2, n_trials=12, batch_size=batch_size)
    assert outcomes(study) == outcomes(
        own_loop(other, optuna.samplers.RandomSampler(seed=1), 2, 12)
    )
    assert ev.stats.unit_runs <= other.stats.unit_runs
    best = study.best_trial
    assert best.value == ev.score(fp.from_removed([best.user_attrs["removed"]], ev.num_units))[0]


def test_a_batch_of_one_is_optunas_loop_with_any_sampler(hf):
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=3, n_startup_trials=4))
    optimize(study, evaluator(hf), num_remove=2, n_trials=14, batch_size=1)
    sampler = optuna.samplers.TPESampler(seed=3, n_startup_trials=4)
    assert outcomes(study) == outcomes(own_loop(evaluator(hf), sampler, 2, 14))


def test_a_batch_shares_its_prefixes_and_runs_nothing_twice(hf):
    ev = evaluator(hf)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    optimize(study, ev, num_remove=3, n_trials=60, batch_size=20)
    assert len(study.trials) == 60
    assert (
        ev.stats.masks == len({tuple(trial.user_attrs["removed"]) for trial in study.trials}) <= 10
    )
    assert ev.stats.unit_runs < ev.stats.naive_unit_runs


def test_a_race_prunes_and_what_it_keeps_is_exact(hf):
    ev = evaluator(hf)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=2))
    optimize(study, ev, num_remove=2, n_trials=16, batch_size=8, racing=0.99, keep=2)
    states = [trial.state for trial in study.trials]
    assert {*states} == {PRUNED, COMPLETE}
    masks = fp.from_removed([trial.user_attrs["removed"] for trial in study.trials], ev.num_units)
    losses = ev.score(masks)
    for trial, loss in zip(study.trials, losses.tolist()):
        assert trial.state == PRUNED or trial.value == loss
    assert study.best_value == losses.min()  # six rows are too few to be wrong on: they are all run


def test_protected_units_stay_and_other_parameters_serve(hf):
    ev = evaluator(hf, granularity="sublayer")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=2))
    optimize(study, ev, num_remove=3, n_trials=8, protect="sleb")
    assert all(set(trial.user_attrs["removed"]) <= set(range(2, 8)) for trial in study.trials)
    study = optuna.create_study()
    optimize(study, ev, n_trials=5, suggest=lambda trial: [trial.suggest_int("first", 0, 7), 8])
    assert [trial.user_attrs["removed"] for trial in study.trials] == [
        [t.params["first"], 8] for t in study.trials
    ]


def test_losses_that_are_not_finite_fail(hf):
    import torch

    broken = build("llama")
    with torch.no_grad():
        broken.model.layers[4].mlp.down_proj.weight.fill_(float("nan"))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    optimize(study, evaluator(broken), num_remove=1, n_trials=20)
    assert [t.state == COMPLETE for t in study.trials] == [
        t.user_attrs["removed"] == [4] for t in study.trials
    ]


def test_an_interrupted_batch_leaves_no_trial_running(hf):
    ev, study = evaluator(hf), optuna.create_study()

    def interrupt(event):
        raise KeyboardInterrupt

    ev.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        optimize(study, ev, num_remove=2, n_trials=8, batch_size=4)
    assert [trial.state for trial in study.trials] == [FAIL] * 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_remove": 5}, "num_remove must be an integer from 0 to 4"),
        ({}, "num_remove must be an integer from 0 to 4, not None"),
        ({"num_remove": 4, "protect": (0, 1)}, "num_remove must be an integer from 0 to 3"),
        ({"num_remove": 2, "n_trials": 0}, "n_trials must be"),
        ({"num_remove": 2, "batch_size": 2.0}, "batch_size must be"),
        ({"num_remove": 2, "racing": 1.0}, "racing must be between"),
        ({"num_remove": 2, "suggest": lambda trial: [1]}, "either suggest or num_remove"),
        ({"suggest": lambda trial: [9]}, "removed unit 9 is out of range"),
    ],
)
def test_wrong_arguments(hf, wrong, message):
    with pytest.raises(fp.InputError, match=message):
        optimize(optuna.create_study(), evaluator(hf), **wrong)


def test_wrong_studies(hf):
    ev = evaluator(hf)
    for study in (
        optuna.create_study(direction="maximize"),
        optuna.create_study(directions=["minimize"] * 2),
    ):
        with pytest.raises(fp.InputError, match="must minimize one value"):
            optimize(study, ev, 2)
    with pytest.raises(fp.InputError, match="must be an optuna study"):
        optimize(ev, ev, 2)
    with pytest.raises(fp.InputError, match="must be an Evaluator"):
        optimize(optuna.create_study(), hf, 2)


def test_a_subset_has_the_highest_keys():
    keys = [0.3, 0.9, 0.1, 0.8]
    trial = optuna.trial.FixedTrial({f"unit {i}": key for i, key in enumerate(keys)})
    assert suggest_removed(trial, 4, 2) == (1, 3)
    assert suggest_removed(trial, 4, 2, protect=(1,)) == (0, 3)
    assert suggest_removed(trial, 4, 0) == ()
    np.testing.assert_array_equal(
        fp.from_removed([suggest_removed(trial, 4, 1)], 4), [[1, 0, 1, 1]]
    )


def test_sequences_are_suggested(hf):
    ev = evaluator(hf)

    def suggest(trial):
        first = trial.suggest_int("first", 0, ev.num_units - 1)
        return (*range(first + 1), *range(first, ev.num_units))

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=5))
    optimize(study, ev, n_trials=6, batch_size=3, suggest_sequence=suggest)
    for trial in study.trials:
        assert trial.value == ev.score(sequences=[trial.user_attrs["sequence"]])[0]
        assert "removed" not in trial.user_attrs
    wrong = {"suggest": suggest}, {"num_remove": 1}, {"protect": (0,)}
    for more in wrong:
        with pytest.raises(fp.InputError, match="give suggest_sequence alone"):
            optimize(study, ev, suggest_sequence=suggest, **more)
    with pytest.raises(fp.InputError, match="99 is no unit"):
        optimize(study, ev, n_trials=1, suggest_sequence=lambda trial: (0, 99))
