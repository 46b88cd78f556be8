"""The head: losses of logits in parts of the vocabulary, against float64 and the model's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from families import COMMON, LLAMA_LIKE, build, layers_of, random_rows, reference_losses, some_masks

import fastprune as fp
from fastprune.engine.memory import MemoryLimit
from fastprune.models import Head, open_runner
from fastprune.models import head as heads
from fastprune.models.head import Targets

NAN = float("nan")
SMALL = {"cohere": tf.CohereConfig, "granite": tf.GraniteConfig, "phi": tf.PhiConfig}


def in_parts(logits: torch.Tensor, part: int):
    return list(zip(range(0, logits.shape[1], part), logits.split(part, dim=1)))


def dense_parts(logits: torch.Tensor, part: int):
    return [(of, heads.exact_log_sum_exp(of)) for of in logits.split(part, dim=1)]


def random_logits(size: int, dtype: torch.dtype, seed: int, scale: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(7, size, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.fixture
def small_parts(monkeypatch):
    """The heads of models as small as these are cut, too."""
    monkeypatch.setitem(heads.PART, "cpu", 16)


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "part"), [(1, 1), (61, 61), (61, 7), (64, 8), (65, 8), (61, 60)])
def test_losses_of_targets_equal_those_of_whole_logits(size, part, dtype):
    """Targets on both sides of every cut; several, or none, at a position."""
    logits = random_logits(size, dtype, seed=1)
    edges = sorted({t for at in range(0, size, part) for t in (at, min(at + part, size) - 1)})
    tokens = torch.tensor(edges)
    targets = Targets(7, torch.arange(len(tokens)) % 3 * 2, tokens)
    order = targets.rows.argsort(stable=True)
    targets = Targets(7, targets.rows[order], targets.tokens[order])
    wide = logits.double()
    truth = wide.logsumexp(-1)[targets.rows] - wide[targets.rows, targets.tokens]
    misses = (wide.argmax(-1)[targets.rows] != targets.tokens).double()
    rounding = 4 * torch.finfo(torch.float32).eps * wide.abs().max()
    losses = heads.nll(in_parts(logits, part), targets)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (losses - truth).abs().max() <= rounding
    both = heads.greedy(in_parts(logits, part), targets)
    assert torch.equal(both[0], losses)
    assert torch.equal(both[1].double(), misses)


@pytest.fixture(params=["csrc", "torch"])
def divergence_by(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(heads.native, "extension", None)
    elif not heads.native.available():
        pytest.skip("the extension is not built")


@pytest.mark.usefixtures("divergence_by")
@pytest.mark.parametrize("size_of_change", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize(("size", "part"), [(61, 61), (61, 7), (5000, 512)])
def test_divergence_is_as_near_to_float64_as_log_probabilities_are(size, part, size_of_change):
    """The usual way subtracts rounded log-probabilities; both errors are root mean squares."""
    errors = []
    for seed in range(20):
        dense = random_logits(size, torch.float32, seed)
        masked = dense + random_logits(size, torch.float32, seed + 100, size_of_change)
        p, q = (x.double().log_softmax(-1) for x in (dense, masked))
        truth = (p.exp() * (p - q)).sum(-1)
        p, q = (x.log_softmax(-1) for x in (dense, masked))
        usual = (p.exp() * (p - q)).sum(-1)
        found = heads.kl(dense_parts(dense, part), in_parts(masked, part))
        errors.append([(x - truth).square().mean() for x in (found.double(), usual.double())])
    own, of_usual = np.sqrt(np.mean(errors, axis=0))
    assert own <= 1.1 * of_usual


@pytest.mark.usefixtures("divergence_by")
@pytest.mark.parametrize("part", [61, 7])
def test_equal_logits_have_no_divergence(part):
    logits = random_logits(61, torch.float32, 3)
    assert not heads.kl(dense_parts(logits, part), in_parts(logits.clone(), part)).any()


@pytest.mark.usefixtures("divergence_by")
@pytest.mark.parametrize("part", [61, 7])
def test_logits_that_are_not_numbers_show(part):
    logits = random_logits(61, torch.float32, 3)
    logits[2, 40] = NAN
    targets = Targets(7, torch.arange(7), torch.full((7,), 5))
    expected = torch.arange(7) == 2
    assert torch.equal(heads.nll(in_parts(logits, part), targets).isnan(), expected)
    other = random_logits(61, torch.float32, 4)
    assert torch.equal(heads.kl(dense_parts(other, part), in_parts(logits, part)).isnan(), expected)


@pytest.mark.usefixtures("divergence_by")
@pytest.mark.parametrize("part", [61, 7])
@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min])
def test_tokens_of_no_probability_add_nothing_to_a_divergence(part, hidden):
    dense, masked = (random_logits(61, torch.float32, seed) for seed in (3, 4))
    shown = heads.kl(dense_parts(dense[:, :40], 40), in_parts(masked[:, :40], 40))
    dense[:, 40:] = masked[:, 40:] = hidden
    found = heads.kl(dense_parts(dense, part), in_parts(masked, part))
    torch.testing.assert_close(found, shown)


def test_the_first_of_equal_tokens_is_the_most_likely_one():
    logits = torch.zeros(1, 9)
    targets = Targets(1, torch.zeros(2, dtype=torch.int64), torch.tensor([0, 4]))
    assert heads.greedy(in_parts(logits, 4), targets)[1].tolist() == [0, 1]


# -- a family's own head ---------------------------------------------------------------------------


def small(family: str):
    """Heads with a scale (Cohere, Granite) or a bias (Phi)."""
    if family not in SMALL:
        return build(family)
    torch.manual_seed(0)
    options = {**LLAMA_LIKE, "head_dim": 12, "num_key_value_heads": 3}
    if family == "granite":
        options["logits_scaling"] = 3.0
    hf = tf.AutoModelForCausalLM.from_config(SMALL[family](**options)).eval()
    if family == "phi":
        torch.nn.init.normal_(hf.lm_head.bias)
    return hf


@pytest.mark.parametrize("family", ["llama", "gemma2-sdpa", "gpt2", "cohere", "granite", "phi"])
def test_every_family_scores_in_parts(small_parts, family):
    hf = small(family)
    rows = random_rows(hf.config.vocab_size, [23, 9, 23])
    batch = fp.TokenBatch.from_ids(rows)
    assert open_runner(fp.Model(hf), "generic").head.part == 16
    ev = fp.Evaluator(hf, fp.Perplexity(batch))
    masks = some_masks(ev.num_units, 24, seed=1)
    np.testing.assert_allclose(ev.score(masks), reference_losses(hf, masks, rows), rtol=1e-5)
    kl = fp.Evaluator(hf, fp.KLDivergence(batch))
    assert kl.dense_loss == 0
    assert (kl.score(masks) >= 0).all()


def test_gradients_flow_through_parts(small_parts):
    hf = build("llama")
    runner = open_runner(fp.Model(hf), "generic")
    states = random_logits(36, torch.float32, 5).requires_grad_()
    targets = Targets(7, torch.arange(7), torch.arange(7) * 13)
    loss = runner.head.nll(states, targets).sum()
    whole = torch.nn.functional.cross_entropy(
        hf.lm_head(hf.model.norm(states)), targets.tokens, reduction="sum"
    )
    torch.testing.assert_close(
        *(torch.autograd.grad(x, states)[0] for x in (loss, whole)), rtol=1e-4, atol=1e-5
    )


def centered(hf):
    """Its logits depend on all the vocabulary."""

    class Centered(type(hf)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / output.logits.abs().amax(-1, keepdim=True)
            return output

    hf.__class__ = Centered
    return hf


def test_a_head_that_needs_the_whole_vocabulary_gets_it(small_parts):
    hf = centered(build("gpt2"))
    rows = random_rows(hf.config.vocab_size, [23, 9])
    assert open_runner(fp.Model(hf)).head.part == hf.config.vocab_size
    ev = fp.Evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows)))
    masks = some_masks(ev.num_units, 24, seed=1)
    np.testing.assert_allclose(ev.score(masks), reference_losses(hf, masks, rows), rtol=1e-5)


def hiding(hf, value):
    """Its last tokens have no probability, such as those that only pad its vocabulary."""

    class Hiding(type(hf)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.clone()
            output.logits[..., 60:] = value
            return output

    hf.__class__ = Hiding
    return hf


HIDDEN = [-torch.inf, torch.finfo(torch.float32).min]


@pytest.mark.parametrize("value", HIDDEN)
def test_a_family_may_hide_tokens(small_parts, value):
    hf = hiding(build("gpt2"), value)
    rows = random_rows(60, [23, 9])
    batch = fp.TokenBatch.from_ids(rows)
    ev = fp.Evaluator(hf, fp.Perplexity(batch))
    masks = some_masks(ev.num_units, 24, seed=1)
    np.testing.assert_allclose(ev.score(masks), reference_losses(hf, masks, rows), rtol=1e-5)
    kl = fp.Evaluator(hf, fp.KLDivergence(batch))
    assert kl.dense_loss == 0
    assert np.isfinite(kl.score(masks)).all()


@pytest.mark.parametrize(
    "change", [lambda hf: hf, *(lambda hf, v=v: hiding(hf, v) for v in HIDDEN)]
)
@pytest.mark.parametrize("loss", ["nll", "greedy", "kl"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_with_wrong_losses_is_refused(monkeypatch, family, loss, change):
    right = getattr(Head, loss)
    monkeypatch.setattr(Head, loss, lambda *args: right(*args) + 0.01)
    hf = change(build(family))
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [9]))
    with pytest.raises(fp.InputError, match="its head does not give the losses"):
        fp.Evaluator(hf, fp.Perplexity(batch))


def test_a_foreign_head_takes_the_whole_vocabulary_on_the_generic_path():
    hf = centered(build("llama"))
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [9]))
    rows = [row.tolist() for row in batch.ids.reshape(1, -1)]
    with pytest.raises(fp.InputError, match="not transformers' own"):
        fp.Evaluator(hf, fp.Perplexity(batch), backend="fused")
    ev = fp.Evaluator(hf, fp.Perplexity(batch))
    np.testing.assert_allclose(
        ev.score(np.ones((1, 5), dtype=bool)),
        reference_losses(hf, np.ones((1, 5), dtype=bool), rows),
        rtol=1e-5,
    )


# -- after the last layer --------------------------------------------------------------------------


SIZES = {
    **{key: COMMON[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
WIDE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
OTHER_ENDS = {
    "biogpt": lambda: tf.BioGptConfig(**SIZES, **WIDE, intermediate_size=40),
    "xglm": lambda: tf.XGLMConfig(**SIZES, d_model=32, num_layers=4, attention_heads=4, ffn_dim=40),
    "opt-350m": lambda: tf.OPTConfig(
        **SIZES, **WIDE, ffn_dim=40, word_embed_proj_dim=20, do_layer_norm_before=False
    ),
    "ctrl": lambda: tf.CTRLConfig(
        vocab_size=97, n_positions=64, n_embd=32, dff=40, n_layer=4, n_head=4
    ),
    "trocr": lambda: tf.TrOCRConfig(
        **SIZES, d_model=32, decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=40
    ),
    "xlstm": lambda: tf.xLSTMConfig(
        **{key: SIZES[key] for key in SIZES if key != "max_position_embeddings"},
        hidden_size=32,
        num_hidden_layers=4,
        num_heads=4,
        chunk_size=16,
    ),
}


@pytest.mark.parametrize("family", OTHER_ENDS)
def test_what_follows_the_last_layer_is_run_whatever_its_name(family):
    torch.manual_seed(0)
    hf = tf.AutoModelForCausalLM.from_config(OTHER_ENDS[family]()).eval()
    rows = random_rows(97, [23, 9])
    ev = fp.Evaluator(hf, fp.Perplexity(fp.TokenBatch.from_ids(rows)))
    masks = some_masks(ev.num_units, 22, seed=1)[::3]
    for mask, losses in zip(masks, ev.score_samples(masks)):
        with fp.masked(hf, np.flatnonzero(~mask).tolist()) as pruned, torch.no_grad():
            nll = [
                torch.nn.functional.cross_entropy(
                    pruned(torch.tensor([row]), use_cache=False).logits[0, :-1].double(),
                    torch.tensor(row[1:]),
                )
                for row in rows
            ]
        np.testing.assert_allclose(losses, nll, rtol=1e-5)


# -- the dense reference ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_divergence_has_the_same_bits_whether_the_reference_is_kept(
    small_parts, monkeypatch, family
):
    hf = build(family)
    batch = fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [23, 9, 23]))
    masks = some_masks(len(layers_of(hf)), 24, seed=1)
    kept = fp.Evaluator(hf, fp.KLDivergence(batch)).score(masks)
    monkeypatch.setattr(MemoryLimit, "room_for_references", lambda self, tokens, positions: 0)
    lean = fp.Evaluator(hf, fp.KLDivergence(batch))
    assert lean.score(masks).tobytes() == kept.tobytes()
    assert lean.dense_loss == 0
