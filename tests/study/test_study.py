"""The study: complete, continued after an interruption, refused for other inputs, and its figures
and page."""

from __future__ import annotations

import copy
import itertools
import json
import re
import sys
import weakref

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastprune as fp
from fastprune.search import ALGORITHMS as ALGORITHMS_KNOWN
from fastprune.study import Cell, figures, run_study, summarise, write_report

ALGORITHMS = ["one_shot", "greedy", "beam"]
BUDGETS = [1, 2]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return fp.Model(LlamaForCausalLM(config).eval(), name="tiny")


def text(seed: int):
    ids = np.random.default_rng(seed).integers(0, 97, (4, 13))
    return lambda model: fp.Perplexity(fp.TokenBatch.from_ids(ids))


OBJECTIVES = {"one": text(1), "other": text(2)}


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("studies") / "study"
    return out, run_study([model], OBJECTIVES, ALGORITHMS, BUDGETS, out)


def test_every_cell_is_the_search_itself(finished, model):
    _, study = finished
    assert len(study["cells"]) == len(OBJECTIVES) * len(ALGORITHMS) * len(BUDGETS)
    for cell in study["cells"]:
        evaluator = fp.Evaluator(model, OBJECTIVES[cell["objective"]](model))
        result = fp.run_search(evaluator, cell["algorithm"], cell["num_remove"])
        assert tuple(cell["removed"]) == result.removed
        assert cell["loss"] == result.loss
        assert cell["masks"] == result.evaluations
        assert cell["asked_unit_runs"] == evaluator.stats.asked_unit_runs
        assert cell["naive_unit_runs"] == result.cost.naive_unit_runs
        assert cell["unit_runs"] <= cell["asked_unit_runs"]


def test_every_mask_is_scored_under_every_objective(finished, model):
    _, study = finished
    for label, make in OBJECTIVES.items():
        evaluator = fp.Evaluator(model, make(model))
        masks = fp.from_removed([cell["removed"] for cell in study["cells"]], 6)
        assert [cell["losses"][label] for cell in study["cells"]] == evaluator.score(masks).tolist()
        assert study["dense"]["tiny"][label]["loss"] == evaluator.dense_loss


def test_overlap_and_ranks(finished):
    _, study = finished
    for entry in study["jaccard"]:
        cells = [cell for cell in study["cells"] if cell["num_remove"] == entry["num_remove"]]
        overlaps = {True: [], False: []}
        for a, b in itertools.combinations(cells, 2):
            a_set, b_set = set(a["removed"]), set(b["removed"])
            overlaps[a["objective"] == b["objective"]].append(
                len(a_set & b_set) / len(a_set | b_set)
            )
        assert entry["within"] == pytest.approx(np.mean(overlaps[True]))
        assert entry["across"] == pytest.approx(np.mean(overlaps[False]))
    for entry in study["spearman"]:
        assert entry["chosen_by"] != entry["judged_by"]
        assert entry["rho"] is None or -1 <= entry["rho"] <= 1


def cells_with(
    losses: dict[tuple[int, ...], tuple[float, float]], chosen: list[tuple[int, ...]]
) -> list[Cell]:
    """Cells that chose these masks under "one"; losses: of each mask under "one" and "other"."""
    return [
        Cell(
            "m",
            "one",
            2,
            f"algorithm {i}",
            removed,
            losses[removed][0],
            losses=dict(zip(("one", "other"), losses[removed])),
        )
        for i, removed in enumerate(chosen)
    ]


def test_ranks_of_fewer_than_three_masks_say_nothing():
    losses = {(0, 1): (1.0, 3.0), (0, 2): (2.0, 5.0), (1, 2): (3.0, 4.0)}
    (entry,) = summarise(cells_with(losses, [(0, 1), (0, 2), (0, 1), (0, 2)]))["spearman"]
    assert (entry["masks"], entry["rho"]) == (2, None)
    (entry,) = summarise(cells_with(losses, [(0, 1), (0, 2), (1, 2)]))["spearman"]
    assert (entry["masks"], entry["rho"]) == (3, 0.5)


def test_a_search_that_finds_nothing_is_a_cell_with_an_error(model, tmp_path):
    """A block that breaks every mask that keeps it: searches that do not look for it find no finite
    loss."""
    broken = copy.deepcopy(model.hf)
    broken.model.layers[2].mlp.down_proj.weight.data[:] = torch.nan
    broken = fp.Model(broken, name="broken")
    said: list[str] = []
    study = run_study(
        [broken], OBJECTIVES, ["greedy", "shortgpt"], [1, 2], tmp_path / "s", notify=said.append
    )
    by_name = {
        name: [cell for cell in study["cells"] if cell["algorithm"] == name]
        for name in ("greedy", "shortgpt")
    }
    assert all(
        2 in cell["removed"] and cell["losses"] and cell["error"] is None
        for cell in by_name["greedy"]
    )
    assert all(
        cell["removed"] is None and "not finite" in cell["error"] for cell in by_name["shortgpt"]
    )
    assert [line.split()[0] for line in said if "found nothing" in line] == [
        "2/8",
        "4/8",
        "6/8",
        "8/8",
    ]
    assert study["similarity"] == {"broken": None}
    again = run_study([broken], OBJECTIVES, ["greedy", "shortgpt"], [1, 2], tmp_path / "s")
    assert again["cells"] == study["cells"]
    write_report(study, tmp_path / "report.html")
    assert "not finite" in (tmp_path / "report.html").read_text()


def test_a_study_in_which_nothing_is_found_is_finished_all_the_same(model, tmp_path):
    broken = copy.deepcopy(model.hf)
    broken.lm_head.weight.data[:] = torch.nan
    study = run_study(
        [fp.Model(broken, name="broken")], OBJECTIVES, ALGORITHMS, [1], tmp_path / "s"
    )
    assert all(cell["error"] for cell in study["cells"])
    assert study["jaccard"] == study["spearman"] == study["spread"] == []
    write_report(study, tmp_path / "report.html")


def test_one_prefix_cache_at_a_time(model, tmp_path, monkeypatch):
    """Each may take a quarter of what is free: those of many calibration sets would take nearly all
    of it."""
    alive, most = weakref.WeakSet(), []
    score = fp.Evaluator.score

    def counted(self, masks):
        alive.add(self)
        most.append(len(alive))
        return score(self, masks)

    monkeypatch.setattr(fp.Evaluator, "score", counted)
    run_study([model], OBJECTIVES | {"third": text(3)}, ["one_shot"], BUDGETS, tmp_path / "study")
    assert len(most) > 6
    assert max(most) == 1


def test_shared_scores_save_runs(finished):
    """Greedy and beam begin with the singles that one_shot has scored already."""
    _, study = finished
    made = sum(cell["unit_runs"] for cell in study["cells"])
    asked = sum(cell["asked_unit_runs"] for cell in study["cells"])
    assert made < asked


def test_a_study_that_races_is_made_of_searches_that_race(model, tmp_path):
    ids = np.random.default_rng(5).integers(0, 97, (64, 13))
    objectives = {"long": lambda model: fp.Perplexity(fp.TokenBatch.from_ids(ids))}
    algorithms = ["greedy", "shapley"]
    study = run_study([model], objectives, algorithms, [2], tmp_path / "s", racing=0.9)
    assert study["inputs"]["racing"] == 0.9
    for cell, racing in zip(study["cells"], (0.9, None), strict=True):  # shapley needs every loss
        evaluator = fp.Evaluator(model, objectives["long"](model))
        result = fp.run_search(evaluator, cell["algorithm"], 2, racing=racing)
        assert (tuple(cell["removed"]), cell["loss"]) == (result.removed, result.loss)
        assert cell["decided_early"] == result.decided_early
        assert (result.decided_early > 0) == bool(racing)
        assert cell["loss"] == evaluator.score(result.mask[None]).item()
    write_report(study, tmp_path / "report.html")
    assert "confidence 0.9" in (tmp_path / "report.html").read_text()
    with pytest.raises(fp.InputError, match=r"search\.racing was 0\.9 and is None"):
        run_study([model], objectives, algorithms, [2], tmp_path / "s")


def test_continues_where_it_stopped(finished, model):
    out, study = finished
    lost = sorted((out / "cells").iterdir())[3]
    before = json.loads(lost.read_text())
    lost.unlink()
    again = run_study([model], OBJECTIVES, ALGORITHMS, BUDGETS, out)
    redone = json.loads(lost.read_text())
    assert redone["removed"] == before["removed"]
    assert redone["loss"] == before["loss"]
    assert redone["unit_runs"] == 0  # every score was in the store
    strip = ("unit_runs", "seconds")
    assert [{k: v for k, v in cell.items() if k not in strip} for cell in again["cells"]] == [
        {k: v for k, v in cell.items() if k not in strip} for cell in study["cells"]
    ]


def test_other_settings_are_refused(finished, model, tmp_path):
    out, _ = finished

    def refused(
        message: str, algorithms=ALGORITHMS, budgets=BUDGETS, objectives=OBJECTIVES, **more
    ):
        before = (out / "inputs.json").read_bytes()
        with pytest.raises(fp.InputError, match=message):
            run_study([model], objectives, algorithms, budgets, out, **more)
        assert (out / "inputs.json").read_bytes() == before

    refused(r"search\.num_remove no longer has 2", budgets=[1])
    refused(
        r"objective \(or its calibration set\) differs at 'tiny other'",
        objectives={"one": text(1), "other": text(3)},
    )
    refused("no longer has 'tiny other'", objectives={"one": text(1)})
    refused(
        r"search\.algorithms no longer has 'greedy'; .* no longer has 'beam'; search\.seed was 0 "
        "and is 1; name another folder",
        ALGORITHMS[:1],
        seed=1,
    )
    refused(
        r"search\.options\.beam\.beam_width was 5 and is 2", options={"beam": {"beam_width": 2}}
    )
    refused(r"search\.protect was \[\] and is \[3\]", protect=[3])
    refused("search.protect was", protect="sleb")
    refused("search.granularity was 'block' and is 'sublayer'", granularity="sublayer")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(fp.InputError, match="holds no study"):
        run_study([model], OBJECTIVES, ALGORITHMS, BUDGETS, tmp_path)


def test_a_study_says_what_it_does_before_its_first_search(model, tmp_path):
    said: list[str] = []
    run_study([model], OBJECTIVES, ["greedy"], [1], tmp_path / "s", notify=said.append)
    first = next(place for place, line in enumerate(said) if line.startswith("1/2"))
    assert said[:first] == [
        "reading the weights of tiny",
        *(f"checking tiny on {label}" for label in OBJECTIVES),
    ]


def test_settings_that_only_add_cells_extend_a_study(model, tmp_path):
    """Finished cells are used as they are; the whole is what a new study finds."""
    out, said = tmp_path / "grown", []
    first = run_study([model], {"one": text(1)}, ["greedy"], [1], out)
    inputs = json.loads((out / "inputs.json").read_text())
    more = {"third": text(3), "one": text(1)}, ["one_shot", "greedy"], [2, 1]
    grown = run_study([model], *more, out, notify=said.append)
    assert len([line for line in said if "removed" in line]) == 7
    whole = run_study([model], *more, tmp_path / "whole")
    costs = ("unit_runs", "seconds")

    def results(study):
        return [{k: v for k, v in cell.items() if k not in costs} for cell in study["cells"]]

    assert results(grown) == results(whole)
    assert grown["cells"][-1]["seconds"] == first["cells"][0]["seconds"]
    after = json.loads((out / "inputs.json").read_text())
    wrong = {**more[0], "wrong": lambda model: fp.Perplexity(fp.TokenBatch.from_ids([[1, 97]]))}
    with pytest.raises(fp.InputError, match="vocabulary"):
        run_study([model], wrong, *more[1:], out)
    assert json.loads((out / "inputs.json").read_text()) == after
    assert after["budgets"] == [2, 1]
    assert after.keys() == inputs.keys()
    with pytest.raises(fp.InputError, match=r"search\.num_remove no longer has 2"):
        run_study([model], {"one": text(1)}, ["greedy"], [1], out)


def test_protected_units_stay(model, tmp_path):
    study = run_study([model], OBJECTIVES, ALGORITHMS, [2], tmp_path / "s", protect=[0, 3])
    assert all(not {0, 3} & set(cell["removed"]) for cell in study["cells"])
    for cell in study["cells"]:
        evaluator = fp.Evaluator(model, OBJECTIVES[cell["objective"]](model))
        result = fp.run_search(evaluator, cell["algorithm"], 2, protect=[0, 3])
        assert (tuple(cell["removed"]), cell["loss"]) == (result.removed, result.loss)


def test_what_cannot_be_is_refused_before_the_folder_is_touched(model, tmp_path, monkeypatch):
    def refused(
        message: str, algorithms=ALGORITHMS, budgets=BUDGETS, objectives=OBJECTIVES, **arguments
    ) -> None:
        with pytest.raises(fp.InputError, match=message):
            run_study([model], objectives, algorithms, budgets, tmp_path / "new", **arguments)
        assert not (tmp_path / "new").exists()

    refused("no option 'width'", options={"beam": {"width": 2}})
    refused("beam_width of beam must be at least 1", options={"beam": {"beam_width": 0}})
    refused("above its option max_masks", ["exhaustive"], options={"exhaustive": {"max_masks": 5}})
    refused("tiny: num_remove must be an integer from 0 to 5, since .* not 6", budgets=[1, 6])
    refused("backend", backend="nonsense")
    refused("protected unit 6 is out of range", protect=[6])
    refused("tiny: num_remove is 2, but only 1 unit is not protected", protect=[0, 1, 2, 3, 4])
    refused(
        "options are given for beam, which is not among the algorithms",
        ["greedy"],
        options={"beam": {}},
    )
    refused("racing must be between 0 and 1", racing=1.0)
    refused(
        "shortgpt, shapley do not race; these do: one_shot", ["shortgpt", "shapley"], racing=0.9
    )
    refused("num_remove has no meaning for repeat, which removes nothing", ["repeat"])
    refused("budgets: one_shot removes units, and no size is named", budgets=[])
    refused("budgets: 2 is given twice", budgets=[2, 2])
    refused("algorithms: a study needs at least one", algorithms=[])
    refused("objectives: a study needs at least one", objectives={})
    refused("num_remove must be even", ["evopress"], [1], granularity="sublayer")
    kl = {"divergence": lambda model: fp.KLDivergence(fp.TokenBatch.from_ids([[1, 2]]))}
    refused(
        r"cbo needs gradients, which the objective 'divergence' \(kl\) has not",
        ["cbo"],
        objectives=kl,
    )
    refused(
        "vocabulary",
        objectives={"one": lambda model: fp.Perplexity(fp.TokenBatch.from_ids([[1, 97]]))},
    )
    monkeypatch.setitem(sys.modules, "sklearn", None)
    refused("pip install 'fastprune")


def test_a_study_cannot_lie_below_a_file(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(fp.InputError, match="is a file, not a folder"):
        run_study([model], OBJECTIVES, ALGORITHMS, BUDGETS, tmp_path / "file" / "study")


def test_the_page_stands_alone(finished, tmp_path):
    _, study = finished
    write_report(study, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    patterns, spreads = len(BUDGETS), len(OBJECTIVES)
    ranks = sum(entry["masks"] > 1 for entry in study["spearman"])  # of one mask there are none
    sets = len(BUDGETS)  # the objectives differ in their calibration sets alone
    assert page.count("<svg") == page.count("</svg>") == patterns + ranks + spreads + sets + 1
    for word in (*ALGORITHMS, *OBJECTIVES, "tiny", "RLS"):
        assert word in page


def test_a_rank_figure_names_every_algorithm():
    names = tuple(ALGORITHMS_KNOWN)
    losses = {
        names[:11]: [1.0, 0.5, float("nan")],
        names[11:13]: [2.0, 0.5, 1.0],
        names[13:]: [2.0, 0.1, 2.0],
    }
    figure = figures.rank_figure(
        "7 of 32 removed", "perplexity", {"accuracy": None, "kl": -1.0}, losses
    )
    (axes,) = figure.axes
    said = " ".join(text.get_text() for text in axes.texts)
    assert all(name in said for name in names)
    columns = list(zip(*(line.get_ydata() for line in axes.lines)))
    assert all(
        len(set(column)) == len(losses) for column in columns
    )  # equal ranks do not lie on each other
    figures.as_svg(figure)


def test_calibration_sets_are_compared_with_algorithms(model, tmp_path):
    """Labels of one objective differ in their data alone: overlaps and held-out losses by set, and
    by algorithm."""
    kl = {"kl": lambda model: fp.KLDivergence(fp.TokenBatch.from_ids([[1, 2, 3]]))}
    study = run_study(
        [model], {**OBJECTIVES, **kl}, ALGORITHMS, [2], tmp_path / "s", held_out={"new": text(3)}
    )
    cells = {(cell["objective"], cell["algorithm"]): cell for cell in study["cells"]}
    evaluator = fp.Evaluator(model, text(3)(model))
    for cell in cells.values():
        assert cell["losses"]["new"] == evaluator.score(fp.from_removed([cell["removed"]], 6))[0]
    assert study["dense"]["tiny"]["new"]["loss"] == evaluator.dense_loss
    assert [*study["objectives"], *study["held_out"]] == ["one", "other", "kl", "new"]

    def changes(pairs) -> tuple[float, float]:
        overlaps, differences = [], []
        for a, b in pairs:
            units = {*a["removed"]}, {*b["removed"]}
            overlaps.append(len(units[0] & units[1]) / len(units[0] | units[1]))
            differences.append(abs(a["losses"]["new"] - b["losses"]["new"]))
        return np.mean(overlaps), np.mean(differences)

    assert [entry["algorithm"] for entry in study["calibration"]] == ALGORITHMS
    for entry in study["calibration"]:
        name, others = (
            entry["algorithm"],
            [other for other in ALGORITHMS if other != entry["algorithm"]],
        )
        assert entry["sets"] == ["one", "other"]
        assert entry["losses"].keys() == {"new"}
        expected = {
            "sets": changes([(cells["one", name], cells["other", name])]),
            "algorithms": changes(
                [(cells[of, name], cells[of, other]) for of in entry["sets"] for other in others]
            ),
        }
        for by, (overlap, difference) in expected.items():
            assert entry["overlap"][by] == pytest.approx(overlap)
            assert entry["losses"]["new"][by] == pytest.approx(difference)
    write_report(study, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "How much does the calibration set matter?" in page
    with pytest.raises(fp.InputError, match="'one' is searched with"):
        run_study([model], OBJECTIVES, ALGORITHMS, [2], tmp_path / "t", held_out={"one": text(3)})
