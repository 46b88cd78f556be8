"""Optuna studies over depth masks and sequences, in batches whose trials share their prefixes.

Optuna's own loop scores each trial before it asks for the next, so no trials share a prefix. Here a
study asks for a batch of trials, scores them in one call, and is told the losses. A race may prune
clearly worse trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from ..errors import InputError
from ..evaluator import Evaluator
from ..masks import check_named, check_removed, check_sequence, kept_by, record_units
from ..search import protected_units
from ..validate import check_integer, check_kind, check_probability, require

require("optuna", "optuna")

import optuna  # noqa: E402 (after the check)
from optuna.trial import TrialState  # noqa: E402 (after the check)

Suggest = Callable[..., Iterable[int]]  # from an optuna trial to units


def suggest_removed(
    trial: optuna.Trial, num_units: int, num_remove: int, protect: Iterable[int] = ()
) -> tuple[int, ...]:
    """Choose units to remove, by optuna's parameters `unit 0`, `unit 1`, ... in [0, 1].

    The units with the highest parameters are removed (random keys: Bean, 1994). Every point of the
    parameters' cube is then a subset of the right size. Samplers that model parameters one by one,
    such as TPE, see the value of each unit.

    Args:
        trial: The trial.
        num_units: U.
        num_remove: The number of units to remove.
        protect: Units that stay, and have no parameter.

    Returns:
        The removed units, ascending.

    Examples:
        >>> import optuna
        >>> from fastprune.integrations.optuna import suggest_removed
        >>> trial = optuna.trial.FixedTrial({"unit 0": 0.1, "unit 1": 0.9, "unit 2": 0.5})
        >>> suggest_removed(trial, num_units=3, num_remove=2)
        (1, 2)
    """
    free = [unit for unit in range(num_units) if unit not in set(protect)]
    keys = [trial.suggest_float(f"unit {unit}", 0.0, 1.0) for unit in free]
    return tuple(sorted(free[i] for i in np.argsort(keys, kind="stable")[len(free) - num_remove :]))


def optimize(
    study: optuna.Study,
    evaluator: Evaluator,
    num_remove: int | None = None,
    n_trials: int = 128,
    *,
    batch_size: int = 16,
    racing: float | None = None,
    keep: int = 4,
    protect: Iterable[int] | str = (),
    suggest: Suggest | None = None,
    suggest_sequence: Suggest | None = None,
) -> None:
    """Run trials of an optuna study that minimizes the evaluator's loss, batch by batch.

    The user attribute `removed` of a trial lists its removed units; a sequence other than a mask is
    in the attribute `sequence`. A subset that an earlier batch has scored does not run again. A
    loss that is not finite makes its trial FAIL, and so does an interruption.

    Samplers choose the trials of a batch without their losses. TPESampler(constant_liar=True) keeps
    them apart. A batch_size of 1 is optuna's own loop.

    Args:
        study: The study.
        evaluator: The evaluator that scores trials.
        num_remove: The number of units to remove, chosen by `suggest_removed`.
        n_trials: The number of trials.
        batch_size: The number of trials of a batch.
        racing: A confidence such as 0.99 makes each batch a race (`Evaluator.race`). The study is
            told the exact losses of the `keep` best trials. The others are told as PRUNED, which
            replaces optuna's pruners.
        keep: The number of trials that a race keeps.
        protect: Units that stay, or the name of a preset, as in `run_search`.
        suggest: Instead of num_remove and protect, a function from a trial to its removed units.
        suggest_sequence: Instead of num_remove and protect, a function from a trial to the units
            that run, in order.

    Raises:
        InputError: The study does not minimize one value, or `run_search` would refuse an argument.

    Examples:
        >>> import fastprune as fp
        >>> import optuna
        >>> from fastprune.integrations.optuna import optimize
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> batch = fp.TokenBatch.from_ids([[5, 6, 7, 8, 9], [10, 11, 12]])
        >>> evaluator = fp.Evaluator(fp.load_model("demo"), fp.Perplexity(batch))
        >>> study = optuna.create_study()
        >>> optimize(study, evaluator, num_remove=2, n_trials=8, batch_size=4)
        >>> len(study.trials), len(study.best_trial.user_attrs["removed"])
        (8, 2)
    """
    _check(study, evaluator, n_trials, batch_size, racing, keep)
    units_of_trial = _units_of_trial(evaluator, num_remove, protect, suggest, suggest_sequence)
    known: dict[tuple[int, ...], float] = {}
    for start in range(0, n_trials, batch_size):
        open_trials = []
        try:
            for _ in range(min(batch_size, n_trials - start)):
                open_trials.append(study.ask())
            _run_batch(study, evaluator, open_trials, units_of_trial, known, racing, keep)
        finally:
            for trial in open_trials:  # trials whose loss the study does not know
                study.tell(trial, state=TrialState.FAIL)


def _run_batch(
    study: optuna.Study,
    evaluator: Evaluator,
    open_trials: list[optuna.Trial],
    units_of_trial: Callable[..., tuple[int, ...]],
    known: dict[tuple[int, ...], float],
    racing: float | None,
    keep: int,
) -> None:
    """Score the trials of a batch and tell the study; told trials leave the list."""
    sequences = []
    for trial in open_trials:
        sequences.append(units_of_trial(trial))
        for name, listed in record_units(sequences[-1], evaluator.num_units).items():
            trial.set_user_attr(name, listed)
    new = list(dict.fromkeys(units for units in sequences if units not in known))
    if new:
        if racing is None:
            known.update(zip(new, evaluator.score(sequences=new).tolist()))
        else:
            kept = min(keep, len(new))
            result = evaluator.race(sequences=new, keep=kept, confidence=racing)
            known.update((new[i], loss) for i, loss in zip(result.indices, result.losses.tolist()))
    for units in sequences:
        loss, trial = known.get(units), open_trials.pop(0)
        if loss is None:
            study.tell(trial, state=TrialState.PRUNED)
        elif math.isfinite(loss):
            study.tell(trial, loss)
        else:
            study.tell(trial, state=TrialState.FAIL)


def _check(
    study: optuna.Study,
    evaluator: Evaluator,
    n_trials: int,
    batch_size: int,
    racing: float | None,
    keep: int,
) -> None:
    """Raise InputError for arguments out of range or of another kind."""
    check_kind("study", study, optuna.Study, "an optuna study")
    if list(study.directions) != [optuna.study.StudyDirection.MINIMIZE]:
        raise InputError(
            "the study must minimize one value, the loss: optuna.create_study(direction='minimize')"
        )
    check_kind("evaluator", evaluator, Evaluator, "an Evaluator")
    for name, count in (("n_trials", n_trials), ("batch_size", batch_size), ("keep", keep)):
        check_integer(name, count, least=1)
    if racing is not None:
        check_probability("racing", racing)


def _units_of_trial(
    evaluator: Evaluator,
    num_remove: int | None,
    protect: Iterable[int] | str,
    suggest: Suggest | None,
    suggest_sequence: Suggest | None,
) -> Callable[..., tuple[int, ...]]:
    """Make the function from a trial to the units that run, in order.

    Raises:
        InputError: Arguments exclude one another.
    """
    num_units = evaluator.num_units
    if suggest_sequence is not None:
        if suggest is not None or num_remove is not None or tuple(protect):
            raise InputError("give suggest_sequence alone, without suggest, num_remove and protect")
        return lambda trial: check_named(check_sequence(suggest_sequence(trial), num_units))
    if suggest is not None:
        if num_remove is not None or tuple(protect):
            raise InputError("give either suggest or num_remove and protect")
        return lambda trial: kept_by(check_removed(suggest(trial), num_units), num_units)
    stay = protected_units(protect, num_units, evaluator.granularity)
    most = min(num_units - 1, num_units - len(stay))
    count = check_integer("num_remove", num_remove, 0, most)
    return lambda trial: kept_by(suggest_removed(trial, num_units, count, stay), num_units)
