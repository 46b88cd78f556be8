"""Multiple-choice questions for the demo model: seven kinds, each with its facts, answer and likely
mistakes.

`question` draws one as it is asked of a model, `lesson` as it is trained on; both keep to one
split.
"""

from collections.abc import Sequence
from itertools import pairwise, permutations
from random import Random

from corpus import NAMES, OBJECTS, split_of

# Each maker below returns (what the item is about, the facts as text, what can be asked about
# them); what can be asked is a list of (question, right answer, wrong answers).
Asks = list[tuple[str, str | int, Sequence[str | int]]]
Item = tuple[tuple, str, Asks]


def compare(rng: Random) -> Item:
    low, high = sorted(rng.sample(range(10, 100), 2))
    first, second = rng.sample((low, high), 2)
    if rng.random() < 0.6:
        facts, more, less, large, small = "", "larger", "smaller", str(high), str(low)
        asks = [(f"Which is {word}, {first} or {second}?", word) for word in (more, less)]
    else:
        names = dict(zip((first, second), rng.sample(NAMES, 2)))
        facts = " ".join(f"{names[age]} is {age} years old." for age in (first, second))
        more, less, large, small = "older", "younger", names[high], names[low]
        asks = [(f"Who is {word}?", word) for word in (more, less)]
    answered: Asks = [
        (text, large, [small]) if word == more else (text, small, [large]) for text, word in asks
    ]
    return ("compare", low, high), facts, answered


def most(rng: Random) -> Item:
    """One of three things is named more often than each of the others."""
    things = rng.sample(OBJECTS + NAMES, 3)
    counts = rng.choice([(2, 1, 1), (3, 1, 1), (3, 2, 1), (3, 2, 2), (4, 2, 1)])
    named = [thing for thing, count in zip(things, counts) for _ in range(count)]
    rng.shuffle(named)
    facts = f"Seen: {', '.join(named)}."
    return ("most", *named), facts, [("Which was seen most often?", things[0], things[1:])]


def missing(rng: Random) -> Item:
    """Some things are named, then all but one of them, in any order."""
    things = rng.sample(OBJECTS + NAMES, rng.randint(3, 5))
    gone = rng.choice(things)
    left = [thing for thing in things if thing != gone]
    facts = f"Before: {', '.join(things)}. After: {', '.join(rng.sample(left, len(left)))}."
    return ("missing", gone, *things), facts, [("Which is gone?", gone, left)]


def arithmetic(rng: Random) -> Item:
    minus = rng.random() < 0.5
    a, b = rng.randint(20, 69), rng.randint(1, 9)
    right = a - b if minus else a + b
    facts, question = "", f"What is {a} {'minus' if minus else 'plus'} {b}?"
    if rng.random() < 0.3:
        name = rng.choice(NAMES)
        facts = f"{name} has {a} coins and {'loses' if minus else 'finds'} {b} coins."
        question = f"How many coins does {name} have now?"
    return ("arithmetic", minus, a, b), facts, [(question, right, near(rng, right))]


def sequence(rng: Random) -> Item:
    step = rng.choice((1, 2, 3, 5, 10, -1, -2, -10))
    start = rng.choice([s for s in range(10, 100) if 10 <= s + 4 * step <= 99])
    right = start + 4 * step
    terms = range(start, right, step)[rng.randint(0, 1) :]  # three or four of them are shown
    question = f"What comes next? {', '.join(map(str, terms))}."
    return ("sequence", start, step), "", [(question, right, near(rng, right))]


def near(rng: Random, right: int) -> list[int]:
    """Three wrong numbers of two digits that are easily mistaken for the right one."""
    return rng.sample([right + d for d in (-10, -2, -1, 1, 2, 10) if 10 <= right + d <= 99], 3)


def order(rng: Random) -> Item:
    """Three people ordered by two comparisons that share the one in the middle."""
    names = rng.sample(NAMES, 3)
    word, question = rng.choice(
        [
            ("taller", "Who is there, from tall to short?"),
            ("shorter", "Who is there, from short to tall?"),
        ]
    )
    facts = [f"{one} is {word} than {other}." for one, other in pairwise(names)]
    right = ", ".join(names)
    wrong = [", ".join(other) for other in permutations(names) if other != tuple(names)]
    return (
        ("order", *names),
        " ".join(rng.sample(facts, 2)),
        [(question, right, rng.sample(wrong, 3))],
    )


def copy(rng: Random) -> Item:
    """Say a list again; dull, but what makes a small model learn to look back, which the others
    need."""
    items = rng.sample(OBJECTS + NAMES + [str(n) for n in range(10, 100)], rng.randint(3, 6))
    wrong: set[str] = set()
    while len(wrong) < 3:
        wrong.add(", ".join(rng.sample(items, len(items))))
        wrong.discard(", ".join(items))
    question = f"Say again: {', '.join(items)}."
    return ("copy", *items), "", [(question, ", ".join(items), sorted(wrong))]


KINDS = {f.__name__: f for f in (compare, most, missing, arithmetic, sequence, order, copy)}
# Kinds whose lessons are short come more often, to get their share of the tokens.
LESSONS = [
    *KINDS,
    "compare",
    "compare",
    "most",
    "missing",
    "missing",
    "arithmetic",
    "arithmetic",
    "sequence",
]


def draw(rng: Random, split: str, kind: str) -> tuple[str, Asks]:
    """The facts of one item of the split, and what can be asked about it in random order."""
    while True:
        key, facts, asks = KINDS[kind](rng)
        if split_of(key) == split:
            return facts, rng.sample(asks, len(asks))


def question(rng: Random, split: str, kind: str) -> dict:
    """One question of the split: prompt, choices (each begins with a space), index of the answer,
    kind."""
    facts, asks = draw(rng, split, kind)
    text, right, wrong = asks[0]
    choices = [f" {choice}" for choice in rng.sample([right, *wrong], 1 + len(wrong))]
    prompt = f"{facts} {text} Answer:".lstrip()
    return {
        "prompt": prompt,
        "choices": choices,
        "answer": choices.index(f" {right}"),
        "kind": kind,
    }


def lesson(rng: Random, split: str) -> list[tuple[str, str]]:
    """The same facts with everything asked in turn: (prompt, right answer) pairs that follow each
    other."""
    facts, asks = draw(rng, split, rng.choice(LESSONS))
    prompts = [f" {text} Answer:" for text, _, _ in asks]
    prompts[0] = (facts + prompts[0]).lstrip()
    return [(prompt, f" {right}.") for prompt, (_, right, _) in zip(prompts, asks)]


def questions(rng: Random, split: str, count: int) -> list[dict]:
    """This many different questions of the split, the kinds in turn."""
    seen: set = set()
    rows: list[dict] = []
    while len(rows) < count:
        row = question(rng, split, list(KINDS)[len(rows) % len(KINDS)])
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            rows.append(row)
    return rows
