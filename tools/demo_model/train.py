"""Train the demo model from nothing, or measure one that is there.

    python tools/demo_model/train.py --out DIR [--seed 0] [--minutes 50]
    python tools/demo_model/train.py --evaluate DIR

DIR gets `model/` (a transformers folder) and `data/` (calibration and held-out text and questions).
Training runs for the minutes it is given, on one thread, and draws new stories and questions all
the way.
"""

import argparse
import itertools
import json
import math
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from corpus import story
from questions import lesson, questions
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WINDOW = 256  # tokens in a training or evaluation window
STORIES, LESSONS = 3, 24  # in a step: windows of story text, and half windows filled with questions
# Of prompt and answer tokens in the loss: a prompt is mostly random facts, its answer is what must
# be learned.
WEIGHTS = (0.2, 5.0)
MUON_RATE, ADAM_RATE = 0.01, 2e-3
FILES = {  # the data files: split, number of stories, number of questions
    "": ("calibration", 110, 196),
    "-heldout": ("heldout", 110, 448),
}


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the training split, in which a digit is always a token by itself.

    Words and digits carry the space before them, so that a choice (" 47", " Anna") splits from its
    prompt at the same place whether the two are encoded together or apart.
    """
    rng = Random(f"tokenizer {seed}")
    lines = [story(rng, "train") for _ in range(3000)]
    for _ in range(8000):
        lines.append("".join(prompt + answer for prompt, answer in lesson(rng, "train")))
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=512,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = (
        "eager"  # on a CPU half again as fast as "sdpa" for windows this short
    )
    return LlamaForCausalLM(config)


class Batches:
    """Endless batches of training windows: (token ids, weight of each token in the loss)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.rng = Random(f"train {seed}")
        self.encode = lambda text: (
            tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        )
        self.begin, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.rest: list[int] = []  # what is left of the last story; a window may begin in mid-story

    def stories(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = []
        for _ in range(STORIES):
            while len(self.rest) < WINDOW:
                self.rest += [self.begin, *self.encode(story(self.rng, "train")), self.end]
            rows.append(self.rest[:WINDOW])
            self.rest = self.rest[WINDOW:]
        return torch.tensor(rows), torch.ones(STORIES, WINDOW)

    def lessons(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole lessons one after the other, until the window is full."""
        rows, row_weights, length = [], [], WINDOW // 2
        for _ in range(LESSONS):
            ids, weights = [self.begin], [0.0]
            while len(ids) < length:
                for text, weight in itertools.chain(
                    *(zip(pair, WEIGHTS) for pair in lesson(self.rng, "train"))
                ):
                    part = self.encode(text)
                    ids += part
                    weights += [weight] * len(part)
                ids += [self.end, self.begin]
                weights += [1.0, 0.0]
            rows.append(ids[:length])
            row_weights.append(weights[:length])
        return torch.tensor(rows), torch.tensor(row_weights)


def train(out: Path, seed: int, minutes: float) -> None:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed)
    write_data(out / "data", seed)
    model = build_model(tokenizer)
    batches = Batches(tokenizer, seed)

    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    step, start, reported = 0, time.monotonic(), 0.0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        # The clock is the schedule: warm up over the first 100 steps, hold, then fall to zero by
        # the end.
        scale = min(1.0, (step + 1) / 100, (1 - done) / 0.6)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * scale
        parts = [batches.stories(), batches.lessons()]
        total = sum(weights[:, 1:].sum() for _, weights in parts)
        masks = [None, apart(parts[1][0], tokenizer.bos_token_id)]
        losses = [add_gradient(model, *part, mask, total) for part, mask in zip(parts, masks)]
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(
                f"step {step}  done {done:.0%}  loss on stories {losses[0]:.3f}, on questions "
                f"{losses[1]:.3f}",
                flush=True,
            )
        if (
            done - reported > 0.06
        ):  # a part of the time has gone by: keep what there is, look how it does
            reported = done
            save(model, tokenizer, out / "model")
            evaluate(out, "")
    tokens, spent = step * (STORIES + LESSONS // 2) * WINDOW, (time.monotonic() - start) / 60
    print(f"trained for {step} steps, {tokens:,} tokens, {spent:.1f} minutes")
    save(model, tokenizer, out / "model")
    evaluate(out)


def apart(ids: torch.Tensor, begin: int) -> torch.Tensor:
    """An attention mask in which a token sees only what came before it in its own lesson."""
    which = (ids == begin).cumsum(1)
    seen = (which[:, :, None] == which[:, None, :]).tril()
    return torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None]


def add_gradient(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor | None,
    total: torch.Tensor | float,
) -> float:
    """Add the gradient of the weighted loss, as a share of the step's total weight; return the
    weighted mean."""
    weights = weights[:, 1:].flatten()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    loss = (losses * weights).sum()
    (loss / total).backward()
    return loss.item() / weights.sum().item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder with the weights in bfloat16; the model that goes on training keeps
    float32."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    shipped = LlamaForCausalLM(model.config)
    # transformers' wrapper of it is typed as a plain function
    shipped.to(torch.bfloat16)  # type: ignore[arg-type]
    shipped.load_state_dict(state)
    shipped.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = (
        "float32"  # what it is loaded as: scores of masks differ by less than bfloat16 resolves
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def write_data(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, (split, stories, count) in FILES.items():
        rng = Random(f"{split} {seed}")
        texts = [{"text": story(rng, split, rng.randint(20, 40))} for _ in range(stories)]
        for name, rows in (("text", texts), ("questions", questions(rng, split, count))):
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / f"{name}{suffix}.jsonl").write_text("".join(lines))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def evaluate(out: Path, suffix: str = "-heldout") -> dict[str, Any]:
    """Perplexity of the model in a folder as it is on disk, and its accuracy on each kind of
    question and on all."""
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()

    stream = []
    for row in read_rows(out / "data" / f"text{suffix}.jsonl"):
        stream += tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id]
    windows = torch.tensor(stream[: len(stream) // WINDOW * WINDOW]).view(-1, WINDOW)
    losses = [
        F.cross_entropy(model(input_ids=w[None]).logits[0, :-1], w[1:], reduction="sum").item()
        for w in windows
    ]
    targets = windows[:, 1:].flatten().tolist()
    # The unigram model is fitted to this very text: no other unigram model can do better on it.
    counts = Counter(targets)
    unigram = -sum(n * math.log(n / len(targets)) for n in counts.values()) / len(targets)
    tally: dict[str, list] = {}
    for row in read_rows(out / "data" / f"questions{suffix}.jsonl"):
        scores = [
            choice_score(model, tokenizer, row["prompt"], choice) for choice in row["choices"]
        ]
        right = scores.index(max(scores)) == row["answer"]
        for kind in (row["kind"], "all"):
            tally.setdefault(kind, []).append((right, 1 / len(row["choices"])))
    kinds = []
    for kind, results in sorted(tally.items(), key=lambda item: item[0] == "all"):
        right, chance = (sum(column) / len(results) for column in zip(*results))
        row = {"kind": kind, "questions": len(results), "accuracy": right, "chance": chance}
        kinds.append(row)
    text = {
        "windows": len(windows),
        "tokens": WINDOW,
        "perplexity": math.exp(sum(losses) / len(targets)),
        "unigram": math.exp(unigram),
    }
    return {"text": text, "questions": kinds}


def choice_score(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    """Mean log probability of the choice's tokens after the prompt."""
    begin = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + choice)["input_ids"]])
    logs = model(input_ids=ids).logits[0, begin - 1 : -1].log_softmax(-1)
    return logs.gather(1, ids[0, begin:, None]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--out", type=Path, help="train, and write model/ and data/ into this folder"
    )
    action.add_argument(
        "--evaluate", type=Path, metavar="DIR", help="measure the model in this folder"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=50, help="how long to train (default 50)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.evaluate:
        print(json.dumps(evaluate(arguments.evaluate), indent=1))
    else:
        train(arguments.out, arguments.seed, arguments.minutes)


if __name__ == "__main__":
    main()
