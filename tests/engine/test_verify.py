"""A model is verified before anything runs on it: once for each version, whoever opens it."""

import pytest
import torch
from families import build, layers_of, random_rows
from helpers import make_tasks

import fastprune as fp
from fastprune.models import GenericRunner, Needs, fused, open_runner
from fastprune.models.fused import FusedRunner


@pytest.fixture
def runs(monkeypatch):
    """The units that the generic path runs, as they run."""
    units, run = [], GenericRunner.run

    def spy(self, unit, *rest, **named):
        units.append(unit)
        return run(self, unit, *rest, **named)

    monkeypatch.setattr(GenericRunner, "run", spy)
    return units


def test_blocks_are_verified_once_for_each_version(runs):
    hf = build("llama")
    model = fp.load_model(hf)
    # two short rows, and both together
    once = [block for block in range(model.num_blocks) for _ in range(3)]
    assert runs == once
    runner = open_runner(model, "generic")
    assert open_runner(model, "generic") is runner
    fp.load_model(model)
    assert runs == once
    with fp.masked(model, (1,)):
        pass
    assert runs == [*once, 0, 2, 3, 4]  # the blocks that are left, against the pruned model
    del runs[len(once) :]
    with torch.no_grad():
        layers_of(hf)[0].mlp.down_proj.weight *= 0.5
    open_runner(model, "generic")
    assert runs == 2 * once


def test_sublayers_are_verified_only_where_they_are_asked_for(runs):
    model = fp.load_model(build("llama"))
    opened = len(runs)
    runner = open_runner(model, "generic", Needs("sublayer"))
    assert len(runs) > opened
    state, arguments = runner.open(torch.tensor([[1, 2, 3]]))
    with model.evaluation():
        half = runner.run(0, state, arguments, "sublayer")
        whole = runner.run(1, half, arguments, "sublayer")
        assert torch.equal(whole, runner.run(0, state, arguments))


def test_a_model_that_stops_running_block_by_block_is_refused(tmp_path):
    """The last layer of a model, however opened, begins to overwrite its input."""
    hf = build("llama")
    model = fp.load_model(hf)
    text = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(hf.config.vocab_size, [9])))
    layer = layers_of(hf)[-1]
    forward = layer.forward
    layer.forward = lambda states, *rest, **named: forward(states.mul_(1.0), *rest, **named)

    def refused():
        return pytest.raises(fp.InputError, match=r"'llama'.* overwrite their input")

    for known in (model, hf):
        with refused():
            fp.load_model(known)
        with refused():
            fp.Evaluator(known, text)
        with refused(), fp.masked(known, (1,)):
            pass
        with refused():
            fp.export(known, tmp_path / "pruned", removed=(1,))
    assert not list(tmp_path.iterdir())
    del layer.forward
    assert fp.Evaluator(model, text).dense_loss == fp.Evaluator(hf, text).dense_loss


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, AssertionError, AttributeError])
def test_a_familys_code_may_fail_in_any_way(kind, monkeypatch):
    """Trees run as rows then, blocks have no halves, and "auto" takes the generic path."""

    def fail(*args, **kwargs):
        raise kind("no")

    tasks = make_tasks(97, [(4, (2, 2)), (3, (2, 1))])
    hf = build("llama")
    base, layer = type(hf.model), type(layers_of(hf)[1])
    forward, block, mlp = base.forward, layer.forward, type(layers_of(hf)[1].mlp)

    def without_trees(self, *args, **kwargs):
        positions = kwargs.get("position_ids")
        is_tree = positions is not None and bool((positions.diff() < 1).any())
        return fail() if is_tree else forward(self, *args, **kwargs)

    def without_halves(self, *args, **kwargs):
        return block(self, *args, **kwargs) if type(self.mlp) is mlp else fail()

    expected = fp.Evaluator(hf, fp.TaskMargin(tasks)).dense_loss
    monkeypatch.setattr(base, "forward", without_trees)
    found = fp.Evaluator(hf, fp.TaskMargin(tasks), backend="generic").dense_loss
    assert found == pytest.approx(expected, rel=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(layer, "forward", without_halves)
    text = fp.Perplexity(fp.TokenBatch.from_ids(random_rows(97, [9])))
    with pytest.raises(fp.InputError, match="not the sum of two sublayers"):
        fp.Evaluator(hf, text, granularity="sublayer")
    monkeypatch.undo()
    monkeypatch.setattr(fused, "fast_operators", lambda device, dtype: "torch")
    monkeypatch.setattr(FusedRunner, "open", fail)
    with pytest.warns(RuntimeWarning, match="going on with the generic one"):
        assert fp.Evaluator(hf, text).backend == "generic"
