"""Scores, tree-packed choices, objectives and probes equal what transformers gives without any
sharing."""

import functools
import itertools

import numpy as np
import pytest
import torch
import transformers as tf
from families import (
    FAMILIES,
    LLAMA_LIKE,
    WINDOW,
    WINDOWED,
    build,
    full_log_probs,
    layers_of,
    num_blocks,
    physically_removed,
    random_rows,
    reference_loss,
    reference_losses,
    reference_model,
    reference_token_nll,
    some_masks,
    with_scaled_branches,
)
from helpers import bfloat16_errors

import fastprune as fp
from fastprune.objectives import Objective

LENGTHS = [49, 13, 49, 12, 13]  # two chunks, odd sizes, one padded
RELATIVE = 1e-5  # what the contract allows in float32; roundings here are near 1e-7 per operation


@pytest.fixture(scope="module", params=FAMILIES)
def hf(request):
    return build(request.param)


@pytest.fixture(scope="module")
def rows(hf):
    return random_rows(hf.config.vocab_size, LENGTHS)


def evaluator(hf, rows, **options):
    return fp.Evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows)), **options)


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_scores_equal_physical_removal(hf, rows, granularity):
    ev = evaluator(hf, rows, granularity=granularity)
    assert ev.num_units == num_blocks(hf) * (1 if granularity == "block" else 2)
    masks = some_masks(ev.num_units, 40 if granularity == "block" else 22, seed=1)
    expected = reference_losses(hf, masks, rows, granularity)
    assert len(np.unique(expected.round(4))) > 0.5 * len(
        np.unique(masks, axis=0)
    )  # removing blocks matters here
    np.testing.assert_allclose(ev.score(masks), expected, rtol=RELATIVE)


@pytest.mark.parametrize("family", ["gpt-neox", "gpt-neox-sequential", "gemma2-eager"])
def test_every_choice_of_sublayers_of_two_neighbours(family):
    """A parallel block's half state must not be taken up by the next block's mlp, whichever halves
    are kept."""
    hf = build(family)
    rows = random_rows(hf.config.vocab_size, [13])
    masks = np.array(
        [[1, 1, *halves, 1, 1, 1, 1] for halves in itertools.product([0, 1], repeat=4)], dtype=bool
    )
    expected = reference_losses(hf, masks, rows, "sublayer")
    np.testing.assert_allclose(
        evaluator(hf, rows, granularity="sublayer").score(masks), expected, rtol=RELATIVE
    )


def test_a_mask_that_keeps_nothing(hf, rows):
    ev = evaluator(hf, rows)
    nothing = np.zeros((1, ev.num_units), dtype=bool)
    try:
        expected = reference_loss(physically_removed(hf, range(ev.num_units)), rows)
    except Exception:  # the family's own forward pass cannot do it
        with pytest.raises(fp.InputError, match="keeps nothing"):
            ev.score(nothing)
    else:
        np.testing.assert_allclose(ev.score(nothing), expected, rtol=RELATIVE)


def test_sample_losses_are_means_over_rows(hf, rows):
    ev = evaluator(hf, rows)
    mask = np.arange(ev.num_units) != 1
    expected = [nll.mean() for nll in reference_token_nll(reference_model(hf, mask), rows)]
    np.testing.assert_allclose(ev.score_samples(mask)[0], expected, rtol=RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_transformers_own(family):
    found, own = bfloat16_errors(
        family, LENGTHS, lambda low, rows: fp.Evaluator(low, fp.Perplexity(rows))
    )
    assert own > 1e-5  # bfloat16 has 8 bits: the float32 loss is really another number
    assert found <= 1.5 * own


# -- token trees -----------------------------------------------------------------------------------


def make_tasks(
    vocab_size: int, seed: int = 0
) -> tuple[fp.Tasks, list[list[tuple[list[int], int]]]]:
    """Questions longer than the sliding window, choices of several lengths; one that another begins
    with."""
    rng = np.random.default_rng(seed)

    def tokens(count):
        return rng.integers(0, vocab_size, count).tolist()

    questions = []
    for prompt_length, choice_lengths in [
        (WINDOW + 7, [1, 4, 9]),
        (WINDOW + 11, [3, 3]),
        (5, [2, 8, 5, 1]),
    ]:
        prompt = tokens(prompt_length)
        questions.append([(prompt + tokens(n), prompt_length) for n in choice_lengths])
    prompt, choice = tokens(11), tokens(3)
    questions.append(
        [
            (prompt + choice, 11),
            (prompt + choice + tokens(2), 11),
            (prompt + choice[:1] + tokens(5), 11),
        ]
    )
    arrays = [[(np.asarray(ids), start) for ids, start in question] for question in questions]
    counts = [len(question) for question in questions]
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    tasks = fp.Tasks(
        batch=fp.TokenBatch.from_continuations(arrays),
        question=np.repeat(np.arange(len(counts)), counts),
        answer=first + [rng.integers(n) for n in counts],
        choice_characters=np.array(
            [n - s for q in questions for ids, s in q for n in [len(ids) + 1]]
        ),
        choice_bytes=np.array([n - s for q in questions for ids, s in q for n in [len(ids) + 2]]),
    )
    return tasks, questions


def reference_choice_nll(hf, questions) -> list[np.ndarray]:
    """-log p of each token of each choice, every choice run as a sequence of its own."""
    sequences = [sequence for question in questions for sequence in question]
    nll = reference_token_nll(hf, [ids for ids, _ in sequences])
    return [row[start - 1 :] for row, (_, start) in zip(nll, sequences, strict=True)]


class PerChoice(Objective):
    """Minus the log-likelihood of every choice, as a sample of its own."""

    name = "per choice"

    def __init__(self, tasks: fp.Tasks):
        self.batch = tasks.batch
        self.sample = np.arange(tasks.batch.num_continuations)
        self.weight = np.ones(len(self.sample))
        self.sample_weight = self.weight / len(self.sample)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_choices_in_a_tree_equal_choices_run_alone(hf, granularity):
    tasks, questions = make_tasks(hf.config.vocab_size)
    assert tasks.batch.num_tokens < sum(len(ids) for question in questions for ids, _ in question)
    ev = fp.Evaluator(hf, PerChoice(tasks), granularity=granularity)
    masks = some_masks(ev.num_units, 20, seed=3)[:6]
    for mask, found in zip(masks, ev.score_samples(masks), strict=True):
        expected = [
            nll.sum()
            for nll in reference_choice_nll(reference_model(hf, mask, granularity), questions)
        ]
        np.testing.assert_allclose(found, expected, rtol=RELATIVE)


@pytest.mark.parametrize("family", WINDOWED)
def test_the_window_matters_in_the_tree_test(family):
    """The windowed families' choices would score differently without their window, so that the test
    above can fail."""
    hf = build(family)
    _, questions = make_tasks(hf.config.vocab_size)
    wide = build(family)
    wide.config.sliding_window = 1000
    for layer in layers_of(wide):
        for module in layer.modules():
            if hasattr(module, "sliding_window") and module.sliding_window is not None:
                module.sliding_window = 1000
    narrow_nll, wide_nll = (np.concatenate(reference_choice_nll(m, questions)) for m in (hf, wide))
    assert np.abs(narrow_nll - wide_nll).max() > 0.01


# -- objectives ------------------------------------------------------------------------------------

OBJECTIVE_FAMILIES = ["llama", "gemma2-eager", "gpt-neox", "qwen3-moe"]


@functools.cache
def masks_and_divergences(family: str) -> tuple[np.ndarray, list[float]]:
    hf = build(family)
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    masks = some_masks(num_blocks(hf), 20, seed=4)
    dense = full_log_probs(hf, rows)
    expected = []
    for mask in masks:
        found = full_log_probs(reference_model(hf, mask), rows)
        kl = [(p.exp() * (p - q)).sum(-1)[:-1] for p, q in zip(dense, found, strict=True)]
        expected.append(float(torch.cat(kl).mean()))
    return masks, expected


@functools.cache
def masks_and_choices(family: str) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Masks, and what each one's own model gives for every token of every choice."""
    hf = build(family)
    _, questions = make_tasks(hf.config.vocab_size)
    masks = some_masks(num_blocks(hf), 20, seed=6)
    return masks, [reference_choice_nll(reference_model(hf, mask), questions) for mask in masks]


@pytest.mark.slow
@pytest.mark.parametrize("family", OBJECTIVE_FAMILIES)
@pytest.mark.parametrize("memory_bytes", [None, 400_000])
def test_kl_divergence(family, memory_bytes):
    hf = build(family)
    rows = random_rows(hf.config.vocab_size, LENGTHS)
    ev = fp.Evaluator(hf, fp.KLDivergence(fp.TokenBatch.from_ids(rows)), memory_bytes=memory_bytes)
    masks, expected = masks_and_divergences(family)
    # the terms of a KL divergence are of size log p and cancel: an absolute error of float32
    # roundings remains
    np.testing.assert_allclose(ev.score(masks), expected, rtol=RELATIVE, atol=1e-6)
    assert max(expected) > 0.1


def test_kl_divergence_of_questions_counts_each_predicting_position_once():
    hf = build("llama")
    tasks, questions = make_tasks(hf.config.vocab_size)
    ev = fp.Evaluator(hf, fp.KLDivergence(tasks))
    mask = np.arange(ev.num_units) != 2
    removed = reference_model(hf, mask)
    expected = []
    for question in questions:
        seen = set()
        choices = [ids for ids, _ in question]
        trunk = next(
            t for t in itertools.count() if len({tuple(ids[: t + 1]) for ids in choices}) > 1
        )
        for number, (ids, start) in enumerate(question):
            (p,), (q,) = full_log_probs(hf, [ids]), full_log_probs(removed, [ids])
            for position in range(start - 1, len(ids) - 1):
                place = (
                    position,
                    number if position >= trunk else None,
                )  # what all choices share counts once
                if place not in seen:
                    seen.add(place)
                    expected.append(float((p[position].exp() * (p[position] - q[position])).sum()))
    np.testing.assert_allclose(ev.score(mask)[0], np.mean(expected), rtol=RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("family", OBJECTIVE_FAMILIES)
@pytest.mark.parametrize("normalization", ["mean", "sum"])
def test_task_margin(family, normalization):
    hf = build(family)
    tasks, _ = make_tasks(hf.config.vocab_size)
    ev = fp.Evaluator(hf, fp.TaskMargin(tasks, normalization=normalization))
    masks, choices = masks_and_choices(family)
    samples, losses = ev.score_samples(masks), ev.score(masks)
    for of_mask, found, loss in zip(choices, samples, losses, strict=True):
        reduce = np.mean if normalization == "mean" else np.sum
        ll = np.array([-reduce(nll) for nll in of_mask])
        expected = []
        for q, right in enumerate(tasks.answer):
            of_question = np.flatnonzero(tasks.question == q)
            wrong = of_question[of_question != right]
            expected.append(-(ll[right] - ll[wrong].mean()))
        scale = np.abs(ll).max()  # a margin is a difference: its error is that of the likelihoods
        np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE * scale)
        np.testing.assert_allclose(loss, np.mean(expected), rtol=0, atol=RELATIVE * scale)


@pytest.mark.slow
@pytest.mark.parametrize("family", OBJECTIVE_FAMILIES)
def test_task_likelihood(family):
    hf = build(family)
    tasks, _ = make_tasks(hf.config.vocab_size)
    ev = fp.Evaluator(hf, fp.TaskLikelihood(tasks))
    masks, choices = masks_and_choices(family)
    for of_mask, found in zip(choices, ev.score_samples(masks), strict=True):
        nll = [tokens.mean() for tokens in of_mask]
        np.testing.assert_allclose(found, np.array(nll)[tasks.answer], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", OBJECTIVE_FAMILIES)
@pytest.mark.parametrize("normalization", ["sum", "characters", "bytes", "mean"])
def test_task_accuracy(family, normalization):
    hf = build(family)
    tasks, questions = make_tasks(hf.config.vocab_size)
    ev = fp.Evaluator(hf, fp.TaskAccuracy(tasks, normalization=normalization))
    masks, choices = masks_and_choices(family)
    samples, losses = ev.score_samples(masks), ev.score(masks)
    seen = set()
    for of_mask, found, loss in zip(choices, samples, losses, strict=True):
        ll = np.array([-nll.sum() for nll in of_mask])
        counts = [len(ids) - start for question in questions for ids, start in question]
        lengths = {
            "characters": tasks.choice_characters,
            "bytes": tasks.choice_bytes,
            "mean": np.array(counts),
        }
        ll = ll / lengths.get(normalization, 1)
        expected = []
        for q, right in enumerate(tasks.answer):
            of_question = np.flatnonzero(tasks.question == q)
            expected.append(float(of_question[np.argmax(ll[of_question])] != right))
        assert found.tolist() == expected
        assert loss == pytest.approx(np.mean(expected), abs=1e-15)
        seen.add(tuple(expected))
    assert len(seen) > 1


def test_ties_go_to_the_lower_index():
    """Two equal choices have bit-equal likelihoods: the first of them is the one that is taken."""
    hf = build("llama")
    prompt, choice, other = [5, 6, 7, 8], [9, 10], [11]
    rows = [[(np.asarray(prompt + c), 4) for c in (choice, choice, other)]] * 2
    tasks = fp.Tasks(
        batch=fp.TokenBatch.from_continuations(rows),
        question=np.repeat([0, 1], 3),
        answer=np.array([0, 4]),
        choice_characters=np.ones(6, dtype=int),
        choice_bytes=np.ones(6, dtype=int),
    )
    ev = fp.Evaluator(hf, fp.TaskAccuracy(tasks, normalization="mean"))
    right_first, right_second = ev.score_samples(np.ones(ev.num_units, dtype=bool))[0]
    ll = [
        -nll.mean()
        for nll in reference_choice_nll(hf, [[(prompt + c, 4) for c in (choice, other)]])
    ]
    assert right_first == (0.0 if ll[0] > ll[1] else 1.0)
    assert right_second == 1.0


# -- probes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2-eager", "gpt-neox", "gpt2"])
def test_similarity(family):
    """Against the states that hooks see going into the first layer and out of every layer (before
    the final norm)."""
    hf = build(family)
    rows = random_rows(hf.config.vocab_size, [19, 7, 300, 19][: 2 if family == "gpt2" else 4])
    rows = [row[:128] for row in rows]
    states: list[list[torch.Tensor]] = []

    def before(module, args, kwargs):
        states.append([args[0] if args else kwargs["hidden_states"]])

    def after(module, inputs, output):
        states[-1].append(output[0] if isinstance(output, tuple) else output)

    hooks = [layers_of(hf)[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in layers_of(hf)]
    with torch.no_grad():
        for row in rows:
            hf(input_ids=torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    total = 0
    for of_row in states:
        unit = torch.nn.functional.normalize(
            torch.stack([s[0].double() for s in of_row], dim=1), dim=-1
        )
        total = total + (unit @ unit.mT).sum(0)
    expected = (total / sum(map(len, rows))).numpy()

    found = evaluator(hf, rows).similarity()
    # each cosine is a float32 dot product of unit vectors: errors of a few epsilons
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.array_equal(found, found.T)
    assert np.abs(expected[0, -1]) < 0.9


def test_similarity_of_sublayers_contains_that_of_blocks():
    hf = build("gpt-neox")
    rows = random_rows(hf.config.vocab_size, [11, 9])
    blocks = evaluator(hf, rows).similarity()
    sublayers = evaluator(hf, rows, granularity="sublayer").similarity()
    np.testing.assert_allclose(sublayers[::2, ::2], blocks, atol=1e-6)


GRADIENT_FAMILIES = ["llama", "gemma2-eager", "olmo2", "gpt-neox", "gpt-neox-sequential", "gpt2"]
STEP = 0.02
# Five-point differences in float64: the truncation is of order STEP^4 = 2e-7. Norms and eager
# attention compute in float32 inside transformers, so that a loss near 5 carries about 3e-7, over
# STEP about 2e-5. The gradients that are compared reach 0.1 and more.
GRADIENT_ERROR = 2e-4


@pytest.mark.parametrize("objective", ["perplexity", "margin"])
@pytest.mark.parametrize("family", GRADIENT_FAMILIES)
def test_unit_gradients_equal_finite_differences(family, objective):
    hf = build(family, torch.float64)
    if objective == "perplexity":
        rows = random_rows(hf.config.vocab_size, [9, 13])
        target = fp.Perplexity(fp.TokenBatch.from_ids(rows))

        def sample_losses(model):
            return np.array([nll.mean() for nll in reference_token_nll(model, rows)])
    else:
        tasks, questions = make_tasks(hf.config.vocab_size)
        target = fp.TaskMargin(tasks)

        def sample_losses(model):
            ll = np.array([-nll.mean() for nll in reference_choice_nll(model, questions)])
            losses = []
            for q, right in enumerate(tasks.answer):
                of_question = np.flatnonzero(tasks.question == q)
                losses.append(ll[of_question[of_question != right]].mean() - ll[right])
            return np.array(losses)

    blocks = num_blocks(hf)
    sublayers = np.zeros((target.num_samples, 2 * blocks))
    for unit in range(2 * blocks):
        for weight, steps in ((8, 1), (-1, 2)):
            direction = steps * STEP * (np.arange(2 * blocks) == unit)
            up, down = (
                sample_losses(with_scaled_branches(hf, 1 + sign * direction)) for sign in (1, -1)
            )
            sublayers[:, unit] += weight * (up - down) / (12 * STEP)
    assert np.abs(sublayers).max() > 0.05

    for granularity in ("sublayer", "block"):
        found = fp.Evaluator(hf, target, granularity=granularity).unit_gradients()
        expected = (
            sublayers if granularity == "sublayer" else sublayers[:, 0::2] + sublayers[:, 1::2]
        )
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=GRADIENT_ERROR * max(1, np.abs(expected).max())
        )


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gemma3"])
def test_unit_gradients_equal_autograd(family):
    """Experts are chosen by rank, so that differences over a step jump: here the reference is one
    whole graph."""
    hf = build(family)
    rows = random_rows(hf.config.vocab_size, [9, 13])
    expected = []
    for row in rows:
        scales = torch.ones(2 * num_blocks(hf), requires_grad=True)
        ids = torch.tensor([row])
        logits = with_scaled_branches(hf, scales)(input_ids=ids, use_cache=False).logits[0].double()
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
        expected.append(torch.autograd.grad(loss, scales)[0].double().numpy())
    found = evaluator(hf, rows, granularity="sublayer").unit_gradients()
    # float32: sums of T * D = 500 products and a few hundred roundings on the way back
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


def test_unit_gradients_need_a_differentiable_objective():
    hf = build("llama")
    tasks, _ = make_tasks(hf.config.vocab_size)
    for objective in (fp.TaskAccuracy(tasks), fp.KLDivergence(tasks)):
        with pytest.raises(fp.InputError, match="gradient"):
            fp.Evaluator(hf, objective).unit_gradients()


# -- attention and positions that depend on the length of a row ------------------------------------


def with_random_weights(config):
    torch.manual_seed(3)
    hf = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return hf.eval()


def test_local_attention_without_a_sliding_window_is_right_or_refused():
    """GPT-Neo's window is a mask inside its layers, over places in the row, which a packed tree
    does not keep."""
    config = tf.GPTNeoConfig(
        vocab_size=60,
        hidden_size=16,
        num_layers=4,
        num_heads=2,
        attention_types=[[["global", "local"], 2]],
        window_size=12,
        max_position_embeddings=64,
    )
    hf = with_random_weights(config)
    tasks, questions = make_tasks(60)
    try:
        found = fp.Evaluator(hf, PerChoice(tasks)).score_samples(np.ones(4, dtype=bool))[0]
    except fp.InputError:
        return
    np.testing.assert_allclose(
        found, [nll.sum() for nll in reference_choice_nll(hf, questions)], rtol=RELATIVE
    )


def test_positions_that_depend_on_the_length():
    """Long-context Phi-3 takes other rotary frequencies for rows beyond its original length."""
    config = tf.Phi3Config(
        **(LLAMA_LIKE | {"head_dim": 12, "num_key_value_heads": 3, "max_position_embeddings": 64}),
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 6,
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 16,
        },
    )
    hf = with_random_weights(config)
    for lengths in ([16, 15], [17, 18]):
        rows = random_rows(hf.config.vocab_size, lengths)
        expected = [nll.mean() for nll in reference_token_nll(hf, rows)]
        found = evaluator(hf, rows).score_samples(np.ones(5, dtype=bool))[0]
        np.testing.assert_allclose(found, expected, rtol=RELATIVE)
    with pytest.raises(fp.InputError, match="more than 16 tokens"):
        evaluator(hf, random_rows(hf.config.vocab_size, [17, 16]))
