"""Objectives reduce sums over continuations to losses; checked against plain loops over samples."""

import dataclasses
import math

import numpy as np
import pytest
from tokenizers_for_tests import make_tokenizer

import fastprune as fp
from fastprune.objectives import OBJECTIVES, Difference, Objective, no_judge

LENGTHS = [5, 2, 9, 3]
SHAPES = [(3, [1, 4, 2]), (2, [2, 2]), (4, [3, 1, 1, 5])]


def make_batch() -> fp.TokenBatch:
    rng = np.random.default_rng(0)
    return fp.TokenBatch.from_ids([rng.integers(0, 50, length) for length in LENGTHS])


def make_tasks(answers=(1, 0, 3)) -> fp.Tasks:
    rng = np.random.default_rng(1)
    rows = []
    for prompt_length, choices in SHAPES:
        prompt = rng.integers(0, 50, prompt_length)
        rows.append(
            [(np.concatenate([prompt, rng.integers(0, 50, n)]), prompt_length) for n in choices]
        )
    counts = [len(choices) for _, choices in SHAPES]
    return fp.Tasks(
        batch=fp.TokenBatch.from_continuations(rows),
        question=np.repeat(np.arange(3), counts),
        answer=np.concatenate([[0], np.cumsum(counts)[:-1]]) + answers,
        choice_characters=np.array([4, 8, 2, 1, 5, 3, 2, 5, 4]),
        choice_bytes=np.array([4, 9, 2, 1, 7, 3, 3, 5, 8]),
    )


def nll(num_continuations: int) -> np.ndarray:
    return np.random.default_rng(2).gamma(3, size=(40, num_continuations))


def by_question(tasks: fp.Tasks, per_choice: np.ndarray):
    """(per-choice values of one question, index of the right one) for each question."""
    for q, answer in enumerate(tasks.answer):
        places = np.flatnonzero(tasks.question == q)
        yield per_choice[places], places.tolist().index(answer)


def test_perplexity_averages_over_targets_not_over_rows():
    objective = fp.Perplexity(make_batch())
    sums = nll(4)
    targets = np.array(LENGTHS) - 1
    np.testing.assert_allclose(objective.sample_losses(sums), sums / targets, rtol=1e-14)
    np.testing.assert_allclose(objective.loss(sums), sums.sum(1) / targets.sum(), rtol=1e-14)
    assert not np.allclose(objective.loss(sums), (sums / targets).mean(1))


@pytest.mark.parametrize("normalization", ["mean", "sum"])
def test_margin(normalization):
    tasks = make_tasks()
    objective = fp.TaskMargin(tasks, normalization=normalization)
    sums = nll(9)
    expected = np.zeros((40, 3))
    for i, row in enumerate(sums):
        ll = -row / (tasks.batch.target_counts if normalization == "mean" else 1)
        for q, (values, right) in enumerate(by_question(tasks, ll)):
            expected[i, q] = -(values[right] - np.delete(values, right).mean())
    np.testing.assert_allclose(objective.sample_losses(sums), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(objective.loss(sums), expected.mean(1), rtol=1e-12, atol=1e-13)


def test_margin_weighted_by_choices():
    """The sum of (C - 1) ll(correct) - sum ll(wrong) over questions, divided by the sum of C -
    1."""
    tasks, sums = make_tasks(), nll(9)
    objective = fp.TaskMargin(tasks, weighting="choices")
    expected = np.zeros(40)
    for i, row in enumerate(sums):
        for values, right in by_question(tasks, -row / tasks.batch.target_counts):
            expected[i] -= (len(values) - 1) * values[right] - np.delete(values, right).sum()
    wrong = sum(len(choices) - 1 for _, choices in SHAPES)
    np.testing.assert_allclose(objective.loss(sums), expected / wrong, rtol=1e-12, atol=1e-13)
    plain = fp.TaskMargin(tasks)
    assert np.array_equal(objective.sample_losses(sums), plain.sample_losses(sums))
    assert not np.allclose(objective.loss(sums), plain.loss(sums))


@pytest.mark.parametrize("normalization", ["mean", "sum"])
def test_likelihood_runs_right_choices_alone(normalization):
    tasks = make_tasks()
    objective = fp.TaskLikelihood(tasks, normalization=normalization)
    right = [choices[answer] for (_, choices), answer in zip(SHAPES, (1, 0, 3))]
    assert objective.batch.target_counts.tolist() == right
    assert objective.batch.row_lengths.tolist() == [
        prompt + n for (prompt, _), n in zip(SHAPES, right)
    ]
    whole = tasks.batch
    for continuation, answer in enumerate(tasks.answer):
        expected = whole.target_token[whole.target_continuation == answer]
        found = objective.batch.target_token[objective.batch.target_continuation == continuation]
        assert found.tolist() == expected.tolist()
    sums = nll(3)
    expected = sums / (right if normalization == "mean" else 1)
    np.testing.assert_allclose(objective.sample_losses(sums), expected, rtol=1e-14)
    np.testing.assert_allclose(objective.loss(sums), expected.mean(1), rtol=1e-14)


def test_every_objective_says_what_it_takes():
    assert {name for name, objective in OBJECTIVES.items() if objective.data == "tasks"} == {
        "margin",
        "likelihood",
        "accuracy",
    }
    without = {name for name, objective in OBJECTIVES.items() if not objective.differentiable}
    assert without == {"accuracy", "kl", "agreement", "cosine", "nmse"}


@pytest.mark.parametrize("normalization", ["mean", "sum", "characters", "bytes"])
def test_accuracy(normalization):
    tasks = make_tasks()
    objective = fp.TaskAccuracy(tasks, normalization=normalization)
    sums = nll(9)
    lengths = {
        "mean": tasks.batch.target_counts,
        "sum": 1,
        "characters": tasks.choice_characters,
        "bytes": tasks.choice_bytes,
    }[normalization]
    expected = np.array(
        [
            [float(values.argmin() != right) for values, right in by_question(tasks, row / lengths)]
            for row in sums
        ]
    )
    assert 0 < expected.mean() < 1
    assert np.array_equal(objective.sample_losses(sums), expected)
    np.testing.assert_allclose(objective.loss(sums), expected.mean(1), rtol=1e-14)


def test_ties_go_to_the_lower_index():
    sums = np.ones((1, 9))
    for answers in ((0, 0, 0), (1, 0, 2)):
        objective = fp.TaskAccuracy(make_tasks(answers))
        assert objective.sample_losses(sums)[0].tolist() == [float(a != 0) for a in answers]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(value):
    """A sample with a broken likelihood has no loss; the other samples keep theirs."""
    tasks, batch = make_tasks(), make_batch()
    objectives = (
        fp.Perplexity(batch),
        fp.TaskMargin(tasks),
        fp.TaskLikelihood(tasks),
        fp.TaskAccuracy(tasks),
        fp.KLDivergence(batch),
    )
    for objective in objectives:
        sums = nll(len(objective.sample))
        clean = objective.sample_losses(sums)
        sums[3, 2] = value
        found = objective.sample_losses(sums)
        sample = objective.sample[2]
        assert not np.isfinite(found[3, sample])
        assert not np.isfinite(objective.loss(sums)[3])
        found[3, sample] = clean[3, sample]
        assert np.array_equal(found, clean)
        assert np.isfinite(np.delete(objective.loss(sums), 3)).all()


def test_a_loss_does_not_depend_on_the_other_masks():
    tasks, batch = make_tasks(), make_batch()
    objectives = (
        fp.Perplexity(batch),
        fp.TaskMargin(tasks),
        fp.TaskLikelihood(tasks),
        fp.TaskAccuracy(tasks),
        fp.KLDivergence(tasks),
    )
    for objective in objectives:
        sums = nll(len(objective.sample))
        whole = objective.loss(sums)
        for i in range(len(sums)):
            assert objective.loss(sums[i : i + 1]).tobytes() == whole[i : i + 1].tobytes()
        assert objective.loss(sums[:0]).shape == (0,)
        assert objective.sample_losses(sums[:0]).shape == (0, objective.num_samples)


def test_the_loss_is_the_weighted_sum_of_the_samples():
    tasks, batch = make_tasks(), make_batch()
    objectives = (
        fp.Perplexity(batch),
        fp.TaskMargin(tasks),
        fp.TaskLikelihood(tasks),
        fp.TaskAccuracy(tasks),
        fp.KLDivergence(batch),
    )
    for objective in objectives:
        sums = nll(len(objective.sample))
        np.testing.assert_allclose(
            objective.loss(sums),
            objective.sample_losses(sums) @ objective.sample_weight,
            rtol=1e-12,
        )
        assert objective.sample_weight.sum() == pytest.approx(1)
        assert len(objective.sample_weight) == objective.num_samples


def test_kl_counts_each_predicting_position_once():
    tasks = make_tasks()
    objective = fp.KLDivergence(tasks)
    sources = objective.batch.target_source
    assert sources.tolist() == sorted(set(tasks.batch.target_source.tolist()))
    assert objective.num_samples == tasks.num_questions
    rows = np.searchsorted(tasks.batch.row_starts, sources, side="right") - 1
    assert objective.batch.target_continuation.tolist() == rows.tolist()
    sums = nll(3)
    counts = np.bincount(rows)
    np.testing.assert_allclose(objective.loss(sums), sums.sum(1) / counts.sum(), rtol=1e-14)


def test_perplexity_per_word_and_byte_count_the_targets_text(tmp_path):
    """Windows of 9 tokens; the first token of each is no target."""
    tokenizer = make_tokenizer(adds_bos=False)
    (tmp_path / "t.txt").write_text("the sea is blue and the sky is blue, 42 and 4 to the end")
    batch = fp.load_text(tmp_path / "t.txt", tokenizer, num_samples=2, seq_len=9)
    pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in batch.ids.reshape(2, 9)[:, 1:]]
    texts = ["".join(row).replace("\u0120", " ") for row in pieces]  # \u0120 is a space
    words = np.array([len(text.split()) for text in texts])
    num_bytes = np.array([len(text) for text in texts])
    assert batch.row_words.tolist() == words.tolist()
    assert batch.row_bytes.tolist() == num_bytes.tolist()
    sums = np.array([[3.0, 6.0]])
    assert fp.WordPerplexity(batch).loss(sums) == pytest.approx(9 / words.sum())
    assert fp.BytePerplexity(batch).loss(sums) == pytest.approx(9 / num_bytes.sum())
    assert fp.BytePerplexity(batch).sample_losses(sums) == pytest.approx(sums / num_bytes)
    assert not fp.BytePerplexity(batch).cuts_samples
    keys = {fp.WordPerplexity(batch).content_hash, fp.BytePerplexity(batch).content_hash}
    assert len(keys | {batch.content_hash}) == 3
    no_text = dataclasses.replace(batch, row_words=np.array([3, 0]))
    with pytest.raises(fp.InputError, match="row 1 of the batch holds no text"):
        fp.WordPerplexity(no_text)


def test_names_and_hashes_tell_objectives_apart():
    tasks, batch = make_tasks(), make_batch()
    objectives = [
        fp.Perplexity(batch),
        fp.KLDivergence(batch),
        fp.KLDivergence(tasks),
        fp.Agreement(batch),
        fp.Agreement(batch, "greedy"),
        fp.CosineDistance(batch),
        fp.NormalizedMSE(batch),
        fp.TaskMargin(tasks),
        fp.TaskMargin(tasks, normalization="sum"),
        fp.TaskMargin(tasks, weighting="choices"),
        fp.TaskLikelihood(tasks),
        fp.TaskLikelihood(tasks, normalization="sum"),
        fp.TaskAccuracy(tasks),
        fp.TaskAccuracy(tasks, normalization="characters"),
        fp.TaskAccuracy(tasks, normalization="bytes"),
        fp.TaskAccuracy(tasks, normalization="mean"),
        fp.TaskMargin(make_tasks((0, 1, 2))),
    ]
    keys = {(objective.name, objective.content_hash) for objective in objectives}
    assert len(keys) == len(objectives)
    again = fp.TaskMargin(make_tasks())
    assert (again.name, again.content_hash) in keys
    per_text = {"word_perplexity", "byte_perplexity"}  # need text, which token ids have not
    assert {objective.name for objective in objectives} | per_text == set(OBJECTIVES)


def test_what_is_printed_is_a_line_of_counts_and_settings():
    batch, tasks = make_batch(), make_tasks()
    assert (
        repr(batch)
        == f"TokenBatch({len(LENGTHS)} rows, {len(LENGTHS)} continuations, {sum(LENGTHS)} tokens)"
    )
    assert repr(tasks) == f"Tasks(3 questions, 9 choices, {tasks.batch.num_tokens} tokens)"
    assert (
        repr(fp.Perplexity(batch)) == f"Perplexity({len(LENGTHS)} samples, {sum(LENGTHS)} tokens)"
    )
    assert repr(fp.TaskAccuracy(tasks, normalization="bytes")).endswith(
        "tokens, normalization='bytes')"
    )


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: fp.Perplexity([[1, 2, 3]]), "Perplexity takes a TokenBatch.* not list"),
        (lambda: fp.Perplexity(make_tasks()), "Perplexity takes a TokenBatch.* not Tasks"),
        (lambda: fp.Perplexity(make_tasks().batch), "plain text"),
        (lambda: fp.KLDivergence(None), "KLDivergence takes a TokenBatch"),
        (lambda: fp.TaskMargin(make_batch()), "TaskMargin takes Tasks.* not TokenBatch"),
        (lambda: fp.TaskAccuracy("tasks.jsonl"), "TaskAccuracy takes Tasks.* not str"),
        (lambda: fp.TaskMargin(make_tasks(), normalization="bytes"), "'bytes'"),
        (
            lambda: fp.TaskMargin(make_tasks(), weighting=None),
            "weighting must be one of question, choices, not None",
        ),
        (lambda: fp.TaskLikelihood(make_batch()), "TaskLikelihood takes Tasks.* not TokenBatch"),
        (lambda: fp.TaskLikelihood(make_tasks(), normalization="bytes"), "'bytes'"),
        (lambda: fp.TaskAccuracy(make_tasks(), normalization="acc"), "'acc'"),
        (lambda: fp.WordPerplexity(make_batch()), "WordPerplexity takes text that load_text"),
        (lambda: fp.BytePerplexity(make_batch()), "BytePerplexity takes text that load_text"),
        (lambda: fp.BytePerplexity(make_tasks()), "BytePerplexity takes a TokenBatch"),
    ],
)
def test_refused(make, culprit):
    with pytest.raises(fp.InputError, match=culprit) as caught:
        make()
    assert "\n" not in str(caught.value)


READ = {  # objective: (loss, metric, text, text with an error of 0.01, header, record's key)
    "perplexity": (
        math.log(9.0),
        9.0,
        "perplexity 9.000",
        "perplexity 9.000 ± 0.090",
        "perplexity (lower is better)",
        "perplexity",
    ),
    "word_perplexity": (
        math.log(9.0),
        9.0,
        "perplexity per word 9.000",
        "perplexity per word 9.000 ± 0.090",
        "perplexity per word (lower is better)",
        "perplexity_per_word",
    ),
    "byte_perplexity": (
        math.log(2.0),
        2.0,
        "perplexity per byte 2.0000",
        "perplexity per byte 2.0000 ± 0.0200",
        "perplexity per byte (lower is better)",
        "perplexity_per_byte",
    ),
    "kl": (
        0.25,
        0.25,
        "KL divergence 0.25000 nats",
        "KL divergence 0.25000 ± 0.01000 nats",
        "KL divergence, nats (lower is better)",
        "kl_divergence",
    ),
    "agreement": (
        0.25,
        75.0,
        "acceptance 75.0 %",
        "acceptance 75.0 ± 1.0 %",
        "acceptance, % (higher is better)",
        "acceptance",
    ),
    "cosine": (
        0.5,
        0.5,
        "cosine distance 0.50000",
        "cosine distance 0.50000 ± 0.01000",
        "cosine distance (lower is better)",
        "cosine_distance",
    ),
    "nmse": (
        0.5,
        0.5,
        "normalized MSE 0.50000",
        "normalized MSE 0.50000 ± 0.01000",
        "normalized MSE (lower is better)",
        "normalized_mse",
    ),
    "margin": (
        -1.25,
        1.25,
        "margin 1.2500 nats",
        "margin 1.2500 ± 0.0100 nats",
        "margin, nats (higher is better)",
        "margin",
    ),
    "likelihood": (
        1.5,
        -1.5,
        "log-likelihood -1.5000 nats",
        "log-likelihood -1.5000 ± 0.0100 nats",
        "log-likelihood, nats (higher is better)",
        "log_likelihood",
    ),
    "accuracy": (
        0.46,
        54.0,
        "accuracy 54.0 %",
        "accuracy 54.0 ± 1.0 %",
        "accuracy, % (higher is better)",
        "accuracy",
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_is_read_as_its_metric(name):
    objective = OBJECTIVES[name]
    loss, metric, text, with_error, header, key = READ[name]
    assert objective.metric(loss) == pytest.approx(metric, rel=1e-14)
    assert objective.format(loss) == text
    assert objective.format(loss, math.nan) == text  # one sample has no error
    assert objective.format(loss, 0.01) == with_error
    assert objective.format(loss, named=False) == text.removeprefix(f"{objective.metric_name} ")
    assert objective.header() == header
    assert objective.record(loss) == {"loss": loss, key: objective.metric(loss)}
    assert objective.record(loss, "dense_").keys() == {"dense_loss", f"dense_{key}"}
    better = objective.metric(loss - 0.1) > objective.metric(loss)
    assert better == objective.higher_is_better
    step = 1e-6
    numeric = (objective.metric(loss + step) - objective.metric(loss - step)) / (2 * step)
    assert objective.slope(loss) == pytest.approx(numeric, rel=1e-8)
    assert objective.format(math.nan, 0.1).endswith("nan (not finite)")


def test_extreme_losses_are_printed():
    assert fp.Perplexity.format(1000.0, 0.1) == "perplexity inf"
    assert fp.Perplexity.format(math.log(2.5e7)) == "perplexity 2.5e+07"
    assert fp.TaskMargin.format(0.0) == "margin 0.0000 nats"


def test_an_objective_of_ones_own_is_read_as_its_loss():
    class Own(Objective):
        name = "own"

    assert Own.format(0.5) == "loss 0.50000"
    assert Own.record(0.5) == {"loss": 0.5}


def plain_error(losses, weights) -> float:
    """sqrt(S / (S - 1) sum w^2 (L - mean)^2), in a loop."""
    mean = sum(w * x for w, x in zip(weights, losses))
    total = sum((w * (x - mean)) ** 2 for w, x in zip(weights, losses))
    return math.sqrt(total * len(losses) / (len(losses) - 1))


def test_standard_errors_weigh_samples():
    tasks, batch = make_tasks(), make_batch()
    objectives = (
        fp.Perplexity(batch),
        fp.KLDivergence(batch),
        fp.TaskMargin(tasks),
        fp.TaskMargin(tasks, weighting="choices"),
        fp.TaskAccuracy(tasks),
    )
    for objective in objectives:
        losses = objective.sample_losses(nll(len(objective.sample)))
        errors = objective.standard_error(losses)
        weights = objective.sample_weight.tolist()
        for row, error in zip(losses.tolist(), errors):
            assert error == pytest.approx(plain_error(row, weights), rel=1e-12, abs=1e-15)
    equal = fp.TaskMargin(tasks)
    losses = equal.sample_losses(nll(9))
    usual = losses.std(axis=1, ddof=1) / math.sqrt(losses.shape[1])
    np.testing.assert_allclose(equal.standard_error(losses), usual, rtol=1e-12)


def test_one_sample_has_no_standard_error():
    objective = fp.Perplexity(fp.TokenBatch.from_ids([[5, 6, 7]]))
    assert np.isnan(objective.standard_error(np.array([[1.0]]))).all()
    difference = objective.compare(np.array([1.0]), np.array([0.5]))
    assert difference.value == pytest.approx(math.e - math.exp(0.5))
    assert not difference.told_apart
    assert difference.samples_needed is None
    assert fp.Perplexity.format_difference(difference) == "+1.070"


@pytest.mark.parametrize("name", ["perplexity", "margin", "accuracy"])
def test_differences_have_paired_errors(name):
    """Against plain loops: of metrics, and of their linear parts by sample."""
    tasks, batch = make_tasks(), make_batch()
    objective = {
        "perplexity": fp.Perplexity(batch),
        "margin": fp.TaskMargin(tasks, weighting="choices"),
        "accuracy": fp.TaskAccuracy(tasks),
    }[name]
    losses = objective.sample_losses(nll(len(objective.sample)))
    weights = objective.sample_weight.tolist()
    for one, other in zip(losses[1:6], losses[6:]):
        means = [sum(w * x for w, x in zip(weights, row.tolist())) for row in (one, other)]
        if name == "perplexity":
            value = math.exp(means[0]) - math.exp(means[1])
            slopes = [math.exp(mean) for mean in means]
        else:
            slope = {"margin": -1.0, "accuracy": -100.0}[name]
            value, slopes = slope * (means[0] - means[1]), [slope, slope]
        parts = [a * slopes[0] - b * slopes[1] for a, b in zip(one.tolist(), other.tolist())]
        found = objective.compare(one, other)
        assert found.value == pytest.approx(value, rel=1e-10, abs=1e-10)
        assert found.error == pytest.approx(plain_error(parts, weights), rel=1e-10, abs=1e-10)
        assert found.num_samples == len(weights)
    same = objective.compare(losses[0], losses[0])
    assert (same.value, same.error, same.told_apart) == (0, 0, False)


def test_differences_below_two_errors_are_marked():
    assert Difference(2.1, 1.0, 100).told_apart
    assert not Difference(-2.0, 1.0, 100).told_apart
    assert Difference(-1.0, 1.0, 100).samples_needed == 400
    assert Difference(0.0, 1.0, 100).samples_needed is None
    assert fp.TaskAccuracy.format_difference(Difference(-5.0, 1.0, 100)) == "-5.0 ± 1.0 points"
    marked = fp.TaskMargin.format_difference(Difference(0.5, 0.5, 1000))
    assert marked == "+0.5000 ± 0.5000 nats (not told apart; about 4,000 samples would tell)"
    assert fp.Perplexity.format_difference(Difference(math.nan, math.nan, 9)) == "not finite"


def test_a_mask_without_a_finite_loss_has_no_difference():
    objective = fp.TaskMargin(make_tasks())
    losses = objective.sample_losses(nll(9))
    losses[0, 1] = np.inf
    assert math.isnan(objective.compare(losses[0], losses[1]).value)
    assert not objective.compare(losses[0], losses[1]).told_apart
    assert np.isfinite(objective.standard_error(losses)[1:]).all()


def test_a_judge_that_guesses_is_said_to_be_none():
    objective = fp.TaskAccuracy(make_tasks())
    assert objective.chance == pytest.approx(100 * (1 / 3 + 1 / 2 + 1 / 4) / 3)
    described = {"name": "accuracy", "chance": 25.0, "num_samples": 101}
    # 35 % right: the error is sqrt(0.35 x 0.65 / 100) = 4.77 points, and 10 points are 2.1 of them
    assert no_judge(described, 0.65) == ""
    assert "34.0 ± 4.7 %" in no_judge(described, 0.66)  # 1.9 of them
    assert "22.5 ± 4.2 %" in no_judge(described, 0.775)
    assert "chance (25.0 %)" in no_judge(described, 0.775)
    assert no_judge(described, 1.0)  # all wrong
    assert no_judge(described, 0.0) == ""
    assert no_judge({**described, "num_samples": 1}, 0.0)  # one question says nothing
    assert no_judge(fp.Perplexity(make_batch()).describe(), 3.0) == ""
    assert no_judge(objective.describe(), math.nan) == ""
