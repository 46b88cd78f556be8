"""Heal a pruned checkpoint: a few steps of LoRA (peft) on one text, judged on texts of their own.

heal.py PRUNED --base MODEL --text FILE --judge FILE [--judge FILE] --out HEALED: the model that
PRUNED was cut from is trained alike, for comparison. The adapters are merged into the weights, so
that HEALED is a checkpoint as any other. See docs/healing.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from shared import evaluator, open_model, read_rows

from fastprune.exports.checkpoint import check_target


def read_text(path: str | Path) -> str:
    """A .txt file, or the texts of .jsonl rows {"text"}."""
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix == ".jsonl":
        text = "\n".join(json.loads(line)["text"] for line in text.splitlines())
    return text


def windows(ids: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows, int64[rows, length]."""
    starts = torch.randint(0, len(ids) - length + 1, (rows,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts])


def heal(
    hf,
    tokenizer,
    text: str,
    steps: int = 30,
    rows: int = 4,
    length: int = 128,
    rate: float = 1e-3,
    rank: int = 16,
    seed: int = 0,
):
    """The model with adapters on all of its linear layers trained for some steps, and merged into
    it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    adapters = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(hf, adapters).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.1
    )
    started = time.process_time()
    for step in range(1, steps + 1):
        batch = windows(ids, rows, length, generator)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps:
            seconds = time.process_time() - started
            print(f"step {step}: loss {loss.item():.4f}, {seconds:.0f} s of CPU", flush=True)
    return model.merge_and_unload().eval()


def report(when: str, hf, judges: dict[str, torch.Tensor]) -> None:
    """Print the model's perplexity on every text, with its standard error over windows."""
    for name, rows in judges.items():
        ev = evaluator(hf, rows)
        losses = ev.score_samples([[True] * ev.num_units])
        (loss,), (error,) = ev.objective.mean(losses), ev.objective.standard_error(losses)
        print(f"{when}, {name}: {ev.objective.format(loss, error)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="heal.py")
    parser.add_argument("pruned", help="a folder that fastprune export has written")
    parser.add_argument("--base", required=True, help="the whole model's folder; trained alike")
    parser.add_argument("--text", required=True, help="trains: .txt, or .jsonl rows of texts")
    parser.add_argument(
        "--judge", required=True, action="append", help="another text, which trains nothing"
    )
    parser.add_argument(
        "--out", required=True, type=check_target, help="the healed checkpoint's folder"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    given = parser.parse_args()
    for name, folder in (("whole", given.base), ("pruned", given.pruned)):
        hf, tokenizer = open_model(folder)
        judges = {path: read_rows(tokenizer, path, 32, given.length) for path in given.judge}
        report(f"{name}, untrained", hf, judges)
        settings = given.steps, given.rows, given.length, given.rate
        healed = heal(hf, tokenizer, read_text(given.text), *settings)
        report(f"{name}, trained", healed, judges)
    healed.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
