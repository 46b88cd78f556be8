"""Counts of what goes wrong: bad files, flipped bits, kills, threads, memory.

    python bench/reliability.py [--effort 1] [--out bench/results/reliability.json]

An effort of 1 is all that docs/reliability.md counts, 0.05 a look in a minute or two.

What is counted is what tests/torture checks, by the same functions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE / "tests"), str(HERE / "tests" / "torture")]

import numpy as np  # noqa: E402 (after the path)
import torch  # noqa: E402 (after the path)
from harness import command, forked, killed_after, killed_at, spread, watched  # noqa: E402 (after the path)
from record import save  # noqa: E402 (after the path)

import fastprune as fp  # noqa: E402 (after the path)
from fastprune import demo  # noqa: E402 (after the path)

WORDS = ["<unk>", *(f"w{i}" for i in range(60))]
ODD = [
    "null",
    "true",
    "-1",
    "0",
    "9" * 5000,
    "1e999",
    "NaN",
    '""',
    '"x"',
    '"../x"',
    "[]",
    "{}",
    "[" * 5000,
    '"\\ud800"',
]


def make_files(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of 5 blocks with a tokenizer of words, and a text of 4,000 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(" ".join(f"w{i * i % 60}" for i in range(4000)))
    return folder / "model", folder / "text.txt"


def bad_inputs(model: Path, text: Path, folder: Path, count: int) -> Counter:
    """Commands with one file altered at random: how they end ("2, one line" or "0" is as
    promised)."""
    rng = np.random.default_rng(0)
    files = {
        name: (model / name).read_bytes()
        for name in ("config.json", "tokenizer.json", "model.safetensors")
    }
    rows = [{"prompt": f"w{i} w3", "choices": [" w1", " w2 w5"], "answer": i % 2} for i in range(5)]
    files["tasks.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files["masks.jsonl"] = b'{"removed": [1, 2]}\n{"removed": [3]}\n'
    np.save(folder / "ids.npy", np.arange(48).reshape(4, 12))
    files["ids.npy"] = (folder / "ids.npy").read_bytes()
    found: Counter = Counter()
    for number in range(count):
        name = list(files)[number % len(files)]
        content = altered(files[name], rng)
        bad = folder / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(model, bad)
        (bad / name).write_bytes(content)
        data = {"tasks.jsonl": bad / name, "ids.npy": bad / name}.get(name, text)
        more = (
            ("--objective", "margin")
            if name == "tasks.jsonl"
            else ("--num-samples", 2, "--seq-len", 8)
        )
        masks = ("--masks", bad / name) if name == "masks.jsonl" else ("--removed", 1)
        end = forked(
            lambda m=bad, k=masks, d=data, o=more: command("score", m, *k, "--calibration", d, *o)
        )
        kept = end.status == 0 or (end.status == 2 and end.is_one_line)
        found[
            "2, one line"
            if end.status == 2 and kept
            else "0"
            if kept
            else f"{name}: {end.status} {end.err!r}"
        ] += 1
    return found


def altered(content: bytes, rng: np.random.Generator) -> bytes:
    """A value of a JSON text replaced, or bits flipped, or the end cut off."""
    if rng.random() < 0.5:
        places = [at for at, byte in enumerate(content[:100_000]) if byte in b'0123456789"[{,:']
        at = int(rng.choice(places)) if places else 0
        return (
            content[:at]
            + ODD[rng.integers(len(ODD))].encode()
            + content[at + int(rng.integers(0, 9)) :]
        )
    if rng.random() < 0.3:
        return content[: rng.integers(len(content))]
    flipped = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        flipped[int(rng.integers(min(len(flipped), 3000)))] ^= 1 << int(rng.integers(8))
    return bytes(flipped)


def store_flips(folder: Path, count: int) -> Counter:
    """Single bits of a store flipped: whether it is named, given up, or served, rightly or
    wrongly."""
    import warnings

    model = fp.load_model("demo")
    masks = fp.from_removed([(), *((unit,) for unit in range(model.num_blocks))], model.num_blocks)
    batch = fp.Perplexity(fp.load_text(demo.TEXT, model.tokenizer, 2, 32))
    expected = fp.Evaluator(model, batch, store=folder / "s.db").score(masks).tobytes()
    content = (folder / "s.db").read_bytes()
    rng, found = np.random.default_rng(1), Counter()
    warnings.simplefilter("ignore")
    for _ in range(count):
        damaged = bytearray(content)
        damaged[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        for rest in folder.glob("d.db*"):
            rest.unlink()
        (folder / "d.db").write_bytes(damaged)
        try:
            losses = fp.Evaluator(model, batch, store=folder / "d.db").score(masks).tobytes()
        except fp.InputError:
            found["refused by name"] += 1
            continue
        found["right" if losses == expected else "SERVED WRONG"] += 1
    return found


def threaded_calls(count: int) -> Counter:
    """Calls from four threads on one evaluator, against the same calls alone."""
    model = fp.load_model("demo")
    ev = fp.Evaluator(model, fp.Perplexity(fp.load_text(demo.TEXT, model.tokenizer, 2, 32)))
    masks = np.random.default_rng(0).random((24, model.num_blocks)) < 0.8
    expected = ev.score(masks)

    def call(number: int) -> bool:
        rows = np.random.default_rng(number).permutation(len(masks))[:3]
        return ev.score(masks[rows]).tobytes() == expected[rows].tobytes()

    with ThreadPoolExecutor(4) as threads:
        return Counter("right" if right else "WRONG" for right in threads.map(call, range(count)))


def resident(masks: int, choices: int, prompt: int, memory_bytes: int | None) -> tuple[int, int]:
    """Bytes by which this process grows while it scores so many masks on 8 questions, one of them
    with so many choices and tokens of prompt; and the budget, for None the least that is
    accepted."""
    rng = np.random.default_rng(0)
    model = fp.load_model("demo")
    sizes = [(prompt, choices), *[(20, 4)] * 7]
    rows = [[(rng.integers(3, 60, start), start)] * count for start, count in sizes]
    rows = [
        [(np.concatenate([ids, rng.integers(3, 60, 3)]), start) for ids, start in row]
        for row in rows
    ]
    wanted = rng.random((masks, model.num_blocks)) < 0.7
    wanted[:, 0] = True

    def evaluator(rows, memory_bytes=None) -> fp.Evaluator:
        counts = [len(row) for row in rows]
        question, answer = np.repeat(np.arange(len(rows)), counts), np.cumsum([0, *counts[:-1]])
        tasks = fp.Tasks(
            fp.TokenBatch.from_continuations(rows), question, answer, *np.full((2, sum(counts)), 3)
        )
        return fp.Evaluator(model, fp.TaskMargin(tasks), cache_bytes=0, memory_bytes=memory_bytes)

    evaluator(rows[1:]).score(wanted[:2])  # what libraries keep when they are first used
    if memory_bytes is None:
        try:
            evaluator(rows, 1)
        except fp.InputError as error:
            memory_bytes = int(re.search(r"takes (\d+) bytes", str(error))[1])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident_bytes("VmRSS")
    evaluator(rows, memory_bytes).score(wanted)
    return _resident_bytes("VmHWM") - before, memory_bytes


def _resident_bytes(field: str) -> int:
    return int(re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


SIZES = [
    (1, 10_000, 170),
    (30, 10_000, 30),
    (300, 2_000, 170),
    (3_000, 4, 30),
    (3_000, 300, 170),
    (20_000, 4, 170),
]


def memory(effort: float) -> Iterator[dict[str, Any]]:
    """The memory of a fresh process beyond its budget, at the least budget and at a large one."""
    for masks, choices, prompt in SIZES:
        size = (
            max(1, round(masks * min(1, effort))),
            max(2, round(choices * min(1, effort))),
            prompt,
        )
        row = dict(zip(("masks", "choices", "prompt"), size))
        row["grown"], row["least_limit"] = in_a_process(*size, None)
        row["grown_within_512_mb"], _ = in_a_process(*size, 512 << 20)
        yield row


def in_a_process(*arguments: int | None) -> list[int]:
    """The result of `resident` in a process of its own."""
    code = f"import reliability; print(*reliability.resident(*{arguments}))"
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE / "bench",
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return list(map(int, done.stdout.split()[-2:]))


def kills(name: str, model: Path, text: Path, folder: Path, count: int) -> Counter:
    """A command killed and given again, what came of it: before unit runs, and where it has fewer
    than that, at random moments."""
    data = ("--num-samples", 60, "--seq-len", 64, "--quiet")

    def arguments(out: Path) -> tuple[tuple, Path]:
        store = ("--calibration", text, "--store", out / "s.db", *data)
        removed = [
            part for units in ("", "1", "2", "1,2", "0,4", "3") for part in ("--removed", units)
        ]
        two = ("--algorithm", "greedy", "--num-remove", 2)
        document = out.with_suffix(".toml")
        document.write_text(
            f'[model]\npath = "{model}"\n[[calibration]]\nname = "text"\nkind = "text"\n'
            f'file = "{text}"\nnum_samples = 60\nseq_len = 64\n'
            '[search]\nnum_remove = [1, 2]\nalgorithms = ["one_shot", "greedy"]\n'
        )
        return {
            "score": (
                ("score", model, *removed, *store, "--out", out / "a.jsonl"),
                out / "a.jsonl",
            ),
            "search": (
                ("search", model, *two, *store, "--out", out / "r"),
                out / "r" / "result.json",
            ),
            "study": (
                ("study", document, "--quiet", "--out", out / "s"),
                out / "s" / "study.json",
            ),
            "export": (
                ("export", model, "--removed", "1,3", "--out", out / "e"),
                out / "e" / "model.safetensors",
            ),
        }[name]

    def read(path: Path):
        if path.suffix != ".json":
            return path.read_bytes()
        value = json.loads(path.read_text())
        cells = value.get("cells", [value])
        return [[cell[key] for key in ("removed", "loss")] for cell in cells]

    whole_folder = folder / f"{name}-whole"
    whole_folder.mkdir()
    given, result = arguments(whole_folder)
    end, whole = watched(whole_folder, *given)
    assert end.status == 0, end.err
    expected, found = read(result), Counter()
    numbers = spread(whole.runs, count)
    moments = np.random.default_rng(0).uniform(0, end.seconds, count - len(numbers)).tolist()
    for number in (*numbers, *moments):
        out = folder / f"{name}-{number}"
        out.mkdir()
        given, result = arguments(out)
        killed = (
            killed_at(number, *given) if isinstance(number, int) else killed_after(number, *given)
        )
        while killed.status == 0 and isinstance(number, float):  # it was faster this time
            shutil.rmtree(out)
            out.mkdir()
            number /= 2
            killed = killed_after(number, *given)
        finished = (
            name == "export" and result.exists()
        )  # killed after its folder had got its name: nothing is missing
        again, rest = watched(out, *given)
        same = (again.status == 0 or finished) and read(result) == expected and killed.status < 0
        within = name == "export" or rest.runs <= whole.most_again(number)
        found[
            "same result, at most one chunk repeated"
            if same and within
            else f"{number}: {again} {rest}"
        ] += 1
        shutil.rmtree(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--effort", type=float, default=1.0, help="of all counts; 0.05: a look")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    effort = given.effort
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    faults: list[dict[str, Any]] = []

    def count(fault: str, found: Counter) -> None:
        faults.append({"fault": fault, "tried": found.total(), "ends": dict(found.most_common())})
        print(json.dumps(faults[-1]), flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, text = make_files(folder)
        files = bad_inputs(model, text, folder, max(6, round(420 * effort)))
        count("files altered at random", files)
        count("bits of a store flipped", store_flips(folder, max(5, round(1000 * effort))))
        count("calls from four threads on one model", threaded_calls(max(8, round(2000 * effort))))
        for command_name in ("score", "search", "study", "export"):
            killed = kills(command_name, model, text, folder, max(2, round(20 * effort)))
            count(f"{command_name} killed", killed)
        grown = []
        for row in memory(effort):
            grown.append(row)
            print(json.dumps(row), flush=True)
    save(given.out, {"effort": effort, "faults": faults, "memory": grown})


if __name__ == "__main__":
    main()
