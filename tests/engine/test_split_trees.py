"""Questions on families whose layers take no tree of tokens: each choice runs as a row behind a
copy of its question, with the losses of each choice alone."""

import numpy as np
import pytest
import torch
import transformers as tf
from families import build
from helpers import make_tasks

import fastprune as fp
from fastprune.data.tokens import SplitTrees

COMMON = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
LINEAR = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
CONFIGS = {
    "mamba": lambda: tf.MambaConfig(**COMMON, state_size=8, time_step_rank=4),
    "lfm2": lambda: tf.Lfm2Config(
        **COMMON, **ATTENTION, full_attn_idxs=[1, 3], block_auto_adjust_ff_dim=False
    ),
    "qwen3-next": lambda: tf.Qwen3NextConfig(
        **COMMON,
        **ATTENTION,
        head_dim=8,
        layer_types=LINEAR,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "bloom": lambda: tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=4, n_head=4),
    "gpt-neo": lambda: tf.GPTNeoConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
        max_position_embeddings=64,
    ),
}
SHAPES = [(11, (2, 4, 3)), (6, (1, 5)), (9, (3, 3, 3, 1))]
REMOVED = (1,)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def hf(request):
    torch.manual_seed(0)
    hf = tf.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()
    with torch.no_grad():
        for weights in hf.parameters():
            weights += 0.1 * torch.randn(weights.shape)
    return hf


@pytest.fixture(scope="module")
def tasks():
    return make_tasks(97, SHAPES)


def choices_of(batch):
    """The token ids of each choice with its question, and the start of the choice."""
    for choice, row in enumerate(batch.continuation_row):
        inside = slice(batch.row_starts[row], batch.row_starts[row + 1])
        number = choice - np.flatnonzero(batch.continuation_row == row)[0] + 1
        ids = batch.ids[inside][np.isin(batch.branch[inside], (0, number))]
        yield ids, len(ids) - int(np.count_nonzero(batch.target_continuation == choice))


class Identity(torch.nn.Module):
    """In the place of a removed layer; gives back the states in the layer's kind of output."""

    def __init__(self, layer):
        super().__init__()
        self.__dict__["layer"] = layer

    def __getattr__(self, name):
        return getattr(self.__dict__["layer"], name)

    def forward(self, states, *args, **kwargs):
        kind = type(self.__dict__["layer"]).__name__
        return (states, None) if kind in ("BloomBlock", "GPTNeoBlock") else states


def losses_of_choices(hf, batch):
    """-log p of every choice, summed over its tokens, each choice run alone without a block."""
    base = hf.base_model
    layers = base.h if hasattr(base, "h") else base.layers
    removed = layers[REMOVED[0]]
    layers[REMOVED[0]] = Identity(removed)
    try:
        losses = []
        for ids, start in choices_of(batch):
            with torch.no_grad():
                logits = hf(input_ids=torch.tensor(ids[None]), use_cache=False).logits[0].double()
            nll = -logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
            losses.append(float(nll[start - 1 :].sum()))
        return np.array(losses)
    finally:
        layers[REMOVED[0]] = removed


def test_questions_are_exact(hf, tasks):
    ev = fp.Evaluator(hf, fp.TaskMargin(tasks))
    mask = fp.from_removed([REMOVED], ev.num_units)
    np.testing.assert_allclose(
        ev.sums(mask)[0, 0], losses_of_choices(hf, tasks.batch), rtol=1e-5, atol=1e-5
    )


def test_a_unit_run_is_one_run_of_all_rows(hf, tasks):
    ev = fp.Evaluator(hf, fp.TaskMargin(tasks), cache_bytes=0)
    ev.score(fp.from_removed([(3,), (2, 3)], ev.num_units))
    assert ev.stats.unit_runs == 3
    # every choice reads its question
    expected = [sum(prompt + n for n in sizes) for prompt, sizes in SHAPES]
    assert ev.sample_tokens.tolist() == expected


def test_results_do_not_depend_on_company(hf, tasks):
    ev = fp.Evaluator(hf, fp.TaskMargin(tasks))
    masks = fp.from_removed([(1,), (2,), (1, 2)], ev.num_units)
    together = ev.score_samples(masks)
    alone = fp.Evaluator(hf, fp.TaskMargin(tasks), cache_bytes=0)
    for mask, expected in zip(masks, together, strict=True):
        assert alone.score_samples(mask[None])[0].tolist() == expected.tolist()
    assert alone.score_samples(masks, [2, 0]).tolist() == together[:, [2, 0]].tolist()


def test_families_that_take_trees_run_trees(tasks):
    ev = fp.Evaluator(build("qwen3"), fp.TaskMargin(tasks))
    assert ev.sample_tokens.tolist() == [prompt + sum(sizes) for prompt, sizes in SHAPES]


def test_the_content_of_a_batch_is_the_same_however_it_runs(tasks):
    split = SplitTrees.of(tasks.batch)
    assert split.content_hash == tasks.batch.content_hash
    assert split.read_tokens.sum() > tasks.batch.num_tokens


def one_by_one(batch):
    """The choices of a batch as plain rows, and for each the mask of its tokens that no choice of
    the same question before it had."""
    rows = [ids for ids, _ in choices_of(batch)]
    is_new = []
    for choice, row in enumerate(batch.continuation_row):
        inside = slice(batch.row_starts[row], batch.row_starts[row + 1])
        trunk = int((batch.branch[inside] == 0).sum())
        first = np.flatnonzero(batch.continuation_row == row)[0] == choice
        is_new.append((np.arange(len(rows[choice])) >= trunk) | first)
    return rows, is_new


def states_of(hf, ids):
    """The states before each block and after the last, float64[T, U + 1, D]."""
    layers = hf.base_model.h if hasattr(hf.base_model, "h") else hf.base_model.layers
    states = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in layers
    ]
    hooks.append(
        layers[-1].register_forward_hook(
            lambda _, args, output: states.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    )
    with torch.no_grad():
        hf(input_ids=torch.tensor(ids[None]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.cat(states).double().numpy().transpose(1, 0, 2)


def cosines(states):
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    return unit @ unit.transpose(0, 2, 1)


def test_similarity_is_the_mean_over_the_tokens_of_a_question(hf, tasks):
    rows, is_new = one_by_one(tasks.batch)
    states = np.concatenate([states_of(hf, ids)[new] for ids, new in zip(rows, is_new)])
    assert len(states) == tasks.batch.num_tokens
    ev = fp.Evaluator(hf, fp.TaskMargin(tasks))
    np.testing.assert_allclose(ev.similarity(), cosines(states).mean(axis=0), atol=1e-5)


def test_angular_distance_is_taken_at_the_end_of_each_choice(hf, tasks):
    rows, _ = one_by_one(tasks.batch)
    last = np.stack([states_of(hf, ids)[-1] for ids in rows])
    expected = np.arccos(np.clip(cosines(last), -1, 1)).mean(axis=0) / np.pi
    np.fill_diagonal(expected, 0)
    ev = fp.Evaluator(hf, fp.TaskMargin(tasks))
    np.testing.assert_allclose(ev.angular_distance(), expected, atol=1e-4)


def test_gradients_are_those_of_choices_run_alone(tasks):
    torch.manual_seed(0)
    hf = tf.AutoModelForCausalLM.from_config(CONFIGS["lfm2"]()).eval()
    batch = tasks.batch
    # the same losses from rows of their own, each a question with one choice
    alone = fp.TokenBatch.from_continuations([[choice] for choice in choices_of(batch)])
    number = np.arange(batch.num_continuations)
    sizes = tasks.choice_characters
    ones = fp.Tasks(alone, number, number, sizes, sizes)
    trees = fp.Evaluator(hf, fp.TaskLikelihood(tasks))
    rows = fp.Evaluator(hf, fp.TaskLikelihood(ones))
    gradients, expected = trees.unit_gradients(), rows.unit_gradients()[tasks.answer]
    np.testing.assert_allclose(gradients, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(gradients).max() > 1e-3
    assert trees.unit_salience().shape == (4,)


def test_a_layout_of_whole_trees_is_refused(hf, tasks):
    layout = fp.Evaluator(build("llama"), fp.TaskMargin(tasks)).layout
    assert max(map(len, layout.chunks)) > 1
    with pytest.raises(fp.InputError, match="leave layout out"):
        fp.Evaluator(hf, fp.TaskMargin(tasks), layout=layout)
