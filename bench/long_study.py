"""The study on two pretrained models, an estimated ten hours of one core: bench/study/*.toml.

    python bench/long_study.py OUT --data FOLDER --smollm2 FOLDER [--gemma3 FOLDER]
        [--only smollm2,pairs,optimum,calibration,gemma3]

FOLDER of --data holds wikitext2-test.txt (WikiText-2's test split), arc-easy.jsonl (1,000 rows
{"prompt", "choices", "answer"}), piqa.jsonl (the same) and tinyshakespeare.txt; the third domain,
code, is Python's standard library. WikiText-2 is cut in two where an article begins, questions into
the first 500 and the rest, so that no search sees what judges it. Each document becomes a folder of
results in OUT, where run.json says how long it took. Interrupted, the same command continues from
the last score; run.json then knows the last start alone.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from record import save, took

DOCUMENTS = Path(__file__).with_name("study")
CODE = ("argparse", "ast", "csv", "datetime", "difflib", "doctest", "inspect", "json/decoder")
CODE += ("heapq", "logging/__init__", "pathlib", "random", "statistics", "tarfile", "zipfile")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--gemma3", type=Path)
    parser.add_argument("--only", default="smollm2,pairs,optimum,calibration,gemma3")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    split(arguments.data, out / "data")
    for name in ("smollm2", "gemma3"):
        folder = getattr(arguments, name)
        if folder is not None and not (out / name).exists():
            (out / name).symlink_to(folder.absolute())
    for name in arguments.only.split(","):
        if name == "gemma3" and not (out / "gemma3").exists():
            print("no --gemma3: left out")
            continue
        document = out / f"{name}.toml"
        shutil.copyfile(DOCUMENTS / document.name, document)
        command = ["fastprune", "study", document, "--out", out / f"study-{name}"]
        print(" ".join(map(str, command)), flush=True)
        before = took()
        subprocess.run([sys.executable, "-m", *map(str, command)], check=True)
        save(out / f"study-{name}" / "run.json", {"took": took(since=before)})


def split(data: Path, out: Path) -> None:
    """Write the halves of the texts and of the questions, and the code, into a folder."""
    if out.exists():
        return
    parts = {}
    text = (data / "wikitext2-test.txt").read_text().splitlines(keepends=True)
    middle = next(  # the first article that begins in the second half
        number
        for number, line in enumerate(text)
        if number >= len(text) // 2 and re.fullmatch(r" = [^=]+ = \n", line)
    )
    parts["wikitext-first.txt"] = "".join(text[:middle])
    parts["wikitext-second.txt"] = "".join(text[middle:])
    for name in ("arc-easy", "piqa"):
        rows = (data / f"{name}.jsonl").read_text().splitlines(keepends=True)
        parts[f"{name}-first.jsonl"] = "".join(rows[:500])
        parts[f"{name}-second.jsonl"] = "".join(rows[500:])
    parts["verse.txt"] = (data / "tinyshakespeare.txt").read_text()
    library = Path(argparse.__file__).parent
    parts["code.txt"] = "".join((library / f"{name}.py").read_text() for name in CODE)
    out.mkdir(parents=True)
    for name, content in parts.items():
        (out / name).write_text(content)


if __name__ == "__main__":
    main()
