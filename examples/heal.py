"""Heal a pruned checkpoint: a few steps of LoRA (peft) on text, loss before and after on text that
was held out.

heal.py PRUNED --text FILE --out HEALED: the last tenth of the text is held out. The adapters are
merged into the weights, so that HEALED is a checkpoint as any other. See docs/healing.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from shared import evaluator, open_model
from transformers.utils import logging

from fastprune.exports.checkpoint import check_target


def read_text(path: str) -> str:
    """A .txt file, or the texts of .jsonl rows {"text"}."""
    text = Path(path).read_text(encoding="utf-8")
    return (
        "\n".join(json.loads(line)["text"] for line in text.splitlines())
        if path.endswith(".jsonl")
        else text
    )


def windows(ids: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows, int64[rows, length]."""
    starts = torch.randint(0, len(ids) - length + 1, (rows,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts])


def heal(
    hf,
    ids: torch.Tensor,
    steps: int,
    rows: int,
    length: int,
    rank: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
):
    """The model with adapters on all of its linear layers trained for some steps, and merged into
    it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    adapters = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(hf, adapters).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.1
    )
    for step in range(1, steps + 1):
        batch = windows(ids, rows, length, generator)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps:
            print(f"step {step}: {loss.item():.4f}", flush=True)
    return model.merge_and_unload().eval()


def report(when: str, hf, rows: torch.Tensor) -> None:
    ev = evaluator(hf, rows)
    print(f"held-out text, {when}: {ev.objective.format(ev.dense_loss)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="heal.py")
    parser.add_argument("pruned", help="a folder that fastprune export has written")
    parser.add_argument("--text", required=True, help="a .txt file, or .jsonl rows of texts")
    parser.add_argument(
        "--out", required=True, type=check_target, help="the healed checkpoint's folder"
    )
    parser.add_argument("--base", help="the whole model's folder, to report its loss too")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    given = parser.parse_args()
    logging.disable_progress_bar()
    hf, tokenizer = open_model(given.pruned)
    text = read_text(given.text)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    training, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    rows = windows(held_out, 16, given.length, torch.Generator().manual_seed(1))
    if given.base:
        report("whole model", open_model(given.base)[0], rows)
    report("before", hf, rows)
    started = time.process_time()
    healed = heal(hf, training, given.steps, given.rows, given.length, rate=given.rate)
    print(f"trained for {time.process_time() - started:.0f} s of CPU")
    report("after", healed, rows)
    healed.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
