"""The report as a browser shows it: at the width of a desk and of a phone, in light and dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from families import build

import fastprune as fp
from fastprune.study import run_study, write_report
from fastprune.study.tables import answers, removed_share

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

# What a page is, measured by itself: its width beside the window's, and elements that hide text.
MEASURE = """
<script>
addEventListener("load", () => {
  const cut = [...document.querySelectorAll("h1, h2, p, dt, dd, td, th, figcaption")].filter(
    (e) => !e.closest(".scroll, figure") && (e.scrollWidth > e.clientWidth + 1
      || e.getBoundingClientRect().right > innerWidth));
  const style = getComputedStyle(document.body), paper = style.backgroundColor;
  const told = {width: document.documentElement.scrollWidth, window: innerWidth,
    cut: cut.map((e) => e.textContent.slice(0, 60)), paper, ink: style.color};
  parent.postMessage(JSON.stringify(told), "*");
});
</script>
"""
# Windows of a browser do not get as narrow as a phone; frames do.
FRAME = """<!doctype html>
<style>:root { color-scheme: light dark } body { margin: 0 } iframe { border: 0 }</style>
<pre id="measured"></pre>
<script>
addEventListener("message", (event) => { document.querySelector("pre").textContent = event.data; });
</script>
"""


@pytest.fixture(scope="module")
def study(checkpoint, tmp_path_factory):
    model = fp.load_model(checkpoint)  # its name is an absolute path

    def text(seed: int):
        rows = np.random.default_rng(seed).integers(1, 60, (4, 13))
        return lambda model: fp.Perplexity(fp.TokenBatch.from_ids(rows))

    out = tmp_path_factory.mktemp("studies") / "study"
    makers = {"one": text(1), "other": text(2)}
    algorithms = ["one_shot", "greedy", "beam"]
    return run_study([model], makers, algorithms, [1, "40%"], out, held_out={"unseen": text(3)})


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "report.html"
    write_report(study, path)
    return path


def test_a_page_opens_with_the_answer(study, page):
    lines = answers(study)
    assert len(lines) == 2  # one for each budget
    assert {cell["num_remove"] for cell in study["cells"]} == {1, 2}
    best = min(
        (c for c in study["cells"] if c["objective"] == "one" and c["num_remove"] == 2),
        key=lambda cell: cell["loss"],
    )
    (name,) = study["dense"]
    parameters = study["parameters"][name]
    share = sum(parameters["own"][unit] for unit in best["removed"]) / parameters["total"]
    entries = study["judgements"][name]["unseen"]
    after, before = (
        fp.Perplexity.format(entry["loss"], entry["standard_error"], named=False)
        for entry in (entries[best["judged"]], entries[-1])
    )
    to_whole = fp.objectives.Difference(**entries[best["judged"]]["to_whole"])
    units = fp.study.tables.format_removed(best["removed"])
    assert lines[1] == (
        f"Remove {units}: perplexity (lower is better) {before} -> {after}, difference "
        f"{fp.Perplexity.format_difference(to_whole)}, {100 * share:.0f} % fewer parameters "
        f"(on held-out data)"
    )
    text = page.read_text()
    head = text[text.index("<h1>") : text.index("<h2>")]
    assert lines[0].replace(">", "&gt;") in head


def test_parameters_are_those_of_the_units(study, checkpoint):
    hf = fp.load_model(checkpoint).hf
    (of,) = study["parameters"].values()
    assert of["total"] == sum(weights.numel() for weights in hf.parameters())
    assert of["shared"] == []
    assert of["own"] == [
        sum(weights.numel() for weights in layer.parameters()) for layer in hf.model.layers
    ]


def test_parameters_that_blocks_share_are_removed_with_the_last_of_them(tmp_path):
    hf = build("llama")
    hf.model.layers[2].mlp = hf.model.layers[1].mlp
    batch = fp.TokenBatch.from_ids([[1, 2, 3, 4], [5, 6, 7]])
    makers = {"one": lambda model: fp.Perplexity(batch)}
    model = fp.Model(hf, name="tiny")
    study = run_study([model], makers, ["one_shot"], [1], tmp_path / "s")
    costs = fp.Evaluator(model, makers["one"](model)).unit_costs("params")
    for removed in ((1,), (1, 2), (0, 1)):
        share = 100 * (1 - costs.after(removed) / costs.total)
        text = removed_share(study, {"model": "tiny", "removed": removed})
        assert text == f"{share:.{0 if share >= 10 else 1}f} % fewer parameters"


def test_a_page_has_no_absolute_path(page, checkpoint):
    text = page.read_text()
    assert str(checkpoint.parent) not in text
    assert checkpoint.name in text


def test_held_out_results_are_in_the_page(page):
    text = page.read_text()
    assert "On held-out data" in text


def test_ranks_are_drawn_where_there_are_some(study, page):
    several = {
        (entry["num_remove"], entry["chosen_by"])
        for entry in study["spearman"]
        if entry["masks"] > 1
    }
    text = page.read_text()
    assert ("Does the best under one objective" in text) == bool(several)
    assert len(re.findall(r"<svg", text)) >= len(several)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look with")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_all_of_it(page, tmp_path, width, dark):
    measured = tmp_path / "measured.html"
    measured.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'{FRAME}<iframe src="{measured.name}" width="{width}" height="1900"></iframe>'
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'u'}"]
    options += ["--force-device-scale-factor=1", "--window-size=1300,2000"]
    options += ["--blink-settings=preferredColorScheme=0"] * dark
    image = tmp_path / "page.png"
    for action in ([f"--screenshot={image}"], ["--dump-dom", "--virtual-time-budget=2000"]):
        done = subprocess.run(
            [CHROMIUM, *options, *action, frame.as_uri()],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
    told = json.loads(re.search(r'id="measured">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    assert image.stat().st_size > 10_000
    assert told["window"] == width
    assert told["width"] <= width
    assert told["cut"] == []
    brightness = [sum(map(int, re.findall(r"\d+", told[name])[:3])) for name in ("paper", "ink")]
    assert (brightness[0] < brightness[1]) == dark
