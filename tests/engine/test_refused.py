"""Models that cannot be run block by block are refused by name; a fault that short rows hide shows
on rows as long as those to be scored."""

import numpy as np
import pytest
import torch
import transformers as tf
from families import build, layers_of, num_blocks, random_rows, reference_loss, reference_losses
from helpers import refuses
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import fastprune as fp

LONG = 40


def text(hf, lengths=(LONG, 23)):
    return fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, lengths)))


class Wrapped(nn.Module):
    """A decoder layer with a function applied to its output [B, T, D]."""

    def __init__(self, layer, change):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, hidden_states, *args, **kwargs):
        return self.change(self.layer(hidden_states, *args, **kwargs))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)


def wrapped(hf, changes):
    """The model with the outputs of some blocks changed, {block: function}."""
    for block, change in changes.items():
        layers_of(hf)[block] = Wrapped(layers_of(hf)[block], change)
    return hf.eval()


def sees_ahead(begin, weight=0.1):
    """Adds to each state from a position on a share of the next one's."""

    def change(states):
        if states.shape[1] <= begin + 1:
            return states
        ahead = states.clone()
        ahead[:, begin:-1] += weight * states[:, begin + 1 :]
        return ahead

    return change


def test_a_model_that_is_not_causal_is_refused():
    hf = build("gemma3", use_bidirectional_attention=True)
    refuses("the family 'gemma3_text' .* it is not causal", fp.load_model, hf)
    refuses("it is not causal", fp.Evaluator, hf, text(hf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("begin", [16, 33])
def test_a_model_that_is_not_causal_from_some_position_on_is_refused_where_rows_reach_it(
    begin, dtype
):
    hf = wrapped(build("llama", dtype, max_position_embeddings=256), {2: sees_ahead(begin)})
    short = text(hf, (begin - 1, 9))
    assert np.isfinite(fp.Evaluator(hf, short).dense_loss)
    refuses("it is not causal", fp.Evaluator, hf, text(hf, (begin + 6, 9)))
    refuses("it is not causal", fp.Evaluator, hf, text(hf, (200, 9)))  # each row by itself
    assert np.isfinite(fp.Evaluator(hf, short).dense_loss)


def test_a_row_that_reads_its_company_is_refused():
    """Only long rows do: states of the other rows of a chunk are added to their last tokens."""

    def change(states):
        if states.shape[1] < LONG:
            return states
        return states + 0.1 * (states.mean(dim=0, keepdim=True) - states)

    hf = wrapped(build("llama", max_position_embeddings=512), {1: change})
    refuses("a row has other states beside another row", fp.Evaluator, hf, text(hf))
    alone = text(hf, (400,))  # too long for company
    assert fp.Evaluator(hf, alone).dense_loss == pytest.approx(
        reference_loss(hf, random_rows(hf.config.vocab_size, (400,))), rel=1e-5
    )


def tied(weight):
    """Functions of two blocks: the later one adds a share of the former's output."""
    kept = {}

    def keep(states):
        kept["states"] = states
        return states

    return {1: keep, 3: lambda states: states + weight * kept["states"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [0.3, 0.003])
def test_blocks_tied_across_depth_are_refused(weight, dtype):
    """States are equal to the bit, or the model is refused, however weak the tie is."""
    hf = wrapped(build("llama", dtype), tied(weight))
    refuses("block 3 .* results of other blocks .tied across depth.", fp.Evaluator, hf, text(hf))


class ToyLayer(nn.Module):
    """Adds a linear map of the mean of all states up to each token."""

    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, states, time=1):
        count = torch.arange(1, states.shape[time] + 1, dtype=states.dtype)
        mean = states.cumsum(dim=time) / count.view([-1, 1] if time else [-1, 1, 1])
        return states + self.mix(mean.tanh())


class ToyConfig(tf.PretrainedConfig):
    model_type = "toy"


class ToyBase(tf.PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            ToyLayer(config.hidden_size) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids, use_cache=False, **_):
        begin = states = self.embed_tokens(input_ids)
        style = self.config.style
        if style == "tokens first":
            states = states.transpose(0, 1)
        order = [0, 1, 1, 2, 3] if style == "looped" else range(len(self.layers))
        for number in order:
            if style == "mixed in":  # weakly, so that logits agree within bfloat16's rounding
                states = 0.997 * states + 0.003 * begin
            states = self.layers[number](states, **({"time": 0} if style == "tokens first" else {}))
        if style == "tokens first":
            states = states.transpose(0, 1)
        return BaseModelOutput(last_hidden_state=self.norm(states))


class Toy(tf.PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = ToyBase(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache=False, **_):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)[0]))


def toy(style, dtype=torch.float32):
    torch.manual_seed(0)
    config = ToyConfig(style=style, vocab_size=90, hidden_size=20, num_hidden_layers=4)
    return Toy(config).to(dtype).eval()


def test_a_stack_of_plain_layers_is_scored():
    hf = toy("plain")
    lengths = (LONG, 23)
    expected = reference_loss(hf, random_rows(90, lengths))
    assert fp.Evaluator(hf, text(hf, lengths)).dense_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("style", "reason"),
    [
        ("mixed in", "changes the states in front of block 1"),
        ("tokens first", r"the shape .8, 1, 20., not .rows, tokens, width."),
        ("looped", "does not run its blocks in order, each once"),
    ],
)
def test_stacks_of_other_forms_are_refused(style, reason, dtype):
    hf = toy(style, dtype)
    refuses(f"the family 'toy' cannot be run block by block: .*{reason}", fp.load_model, hf)
    refuses(reason, fp.Evaluator, hf, text(hf))


def test_random_modules_are_compared_with_tolerance():
    """A module whose own two runs differ by rounding is no tie across depth."""
    generator = torch.Generator().manual_seed(0)

    def jitter(states):
        return states * (1 + 2e-7 * torch.randint(0, 2, states.shape, generator=generator))

    hf = wrapped(build("llama"), {2: jitter})
    rows = random_rows(hf.config.vocab_size, (LONG, 23))
    masks = fp.from_removed([(), (1,), (3,)], num_blocks(hf))
    losses = fp.Evaluator(hf, text(hf)).score(masks)
    np.testing.assert_allclose(losses, reference_losses(hf, masks, rows), rtol=1e-5)


def test_a_length_is_verified_once_for_each_version(monkeypatch):
    hf = build("llama")
    model = fp.load_model(hf)
    lengths = []
    forward = type(hf.model).forward

    def spy(self, input_ids=None, **named):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, **named)

    monkeypatch.setattr(type(hf.model), "forward", spy)
    fp.Evaluator(model, text(hf), backend="generic")
    passes = lengths.count(LONG)
    fp.Evaluator(model, text(hf), backend="generic")
    again = lengths.count(LONG) - passes
    # the second opens its rows to be weighed; the first also ran the own forward and two openings
    assert passes == again + 3
