"""Stories for the demo model, made up by a small seeded grammar, and the words it shares with the
questions.

Stories here and questions in `questions.py` are drawn for one of three splits, "train",
"calibration" and "heldout".  Which split an item may appear in is decided by a hash of what the
item is about (see `split_of`), so nothing that is held out can turn up in training, however much
text is drawn.
"""

import hashlib
from random import Random

WOMEN = [
    "Anna",
    "Clara",
    "Eva",
    "Ida",
    "Julia",
    "Laura",
    "Maria",
    "Nora",
    "Rosa",
    "Sara",
    "Tina",
    "Vera",
]
MEN = ["Adam", "Ben", "Carl", "David", "Felix", "Hugo", "Jack", "Leo", "Max", "Otto", "Paul", "Tom"]
NAMES = WOMEN + MEN
JOBS = [
    "baker",
    "teacher",
    "sailor",
    "painter",
    "farmer",
    "doctor",
    "singer",
    "gardener",
    "tailor",
    "miller",
    "potter",
    "weaver",
]
PLACES = {
    "in": [
        "kitchen",
        "garden",
        "barn",
        "cellar",
        "attic",
        "library",
        "forest",
        "tower",
        "workshop",
        "stable",
        "hall",
        "orchard",
    ],
    "at": ["market", "harbour", "station", "bridge", "mill", "well", "school", "inn"],
}
WHERE = {place: preposition for preposition, places in PLACES.items() for place in places}
OBJECTS = [
    "lamp",
    "key",
    "kite",
    "book",
    "cup",
    "rope",
    "basket",
    "coin",
    "drum",
    "map",
    "knife",
    "hat",
    "ring",
    "bell",
    "clock",
    "bottle",
    "ladder",
    "broom",
    "violin",
    "letter",
    "blanket",
    "candle",
    "mirror",
    "hammer",
]
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "golden"]
# Each weather with how it starts, how it goes on, and how it makes people feel.
WEATHER = {
    "rain": ("It began to rain", "The rain was still falling", "wet"),
    "sun": ("The sun came out", "The sun was still shining", "cheerful"),
    "snow": ("Snow began to fall", "The snow was still falling", "cold"),
    "wind": ("A strong wind began to blow", "The wind was still blowing", "restless"),
    "fog": ("Fog came up from the river", "The fog was still thick", "uneasy"),
}
TIMES = ["In the morning", "At noon", "In the afternoon", "In the evening", "At night"]


def split_of(key: object) -> str:
    """The one split that items about `key` belong to: 80 % train, 10 % each for the other two."""
    bucket = hashlib.sha256(repr(key).encode()).digest()[0] % 10
    return {8: "calibration", 9: "heldout"}.get(bucket, "train")


class Story:
    """A few people, a few things, and where everything is; each event reads and changes that
    state."""

    def __init__(self, rng: Random):
        self.rng = rng
        self.people = rng.sample(NAMES, rng.choice((2, 2, 3)))
        self.places = rng.sample(sorted(WHERE), rng.choice((2, 3, 3)))
        self.things = rng.sample(OBJECTS, rng.choice((2, 3)))
        # The cast decides the split: the people and things of a held-out story never met in
        # training.
        self.key = (*sorted(self.people), *sorted(self.things))
        self.colour = {thing: rng.choice(COLOURS) for thing in self.things}
        self.job = dict(zip(self.people, rng.sample(JOBS, len(self.people))))
        self.at = dict.fromkeys(self.people, self.places[0])
        self.lies = {
            thing: rng.choice(self.places) for thing in self.things
        }  # a place, or the holder's name
        self.weather = rng.choice(sorted(WEATHER))
        self.time = 0
        self.last: str | None = (
            None  # who the last sentence was about, and so may be called "she" or "he"
        )

    def tell(self, sentences: int) -> str:
        """The story as one paragraph of about this many sentences."""
        first, other = self.people[:2]
        lines = [
            f"{first} the {self.job[first]} was {self.where(self.at[first])} with {other} the "
            f"{self.job[other]}.",
            f"{WEATHER[self.weather][0]}.",
        ]
        if len(self.people) > 2:
            lines.append(
                f"Their friend {self.people[2]} the {self.job[self.people[2]]} was there too."
            )
        for thing in self.things:
            lines.append(f"There was a {self.named(thing)} {self.where(self.lies[thing])}.")
        events = (
            [self.walk] * 4
            + [self.take] * 4
            + [self.drop] * 3
            + [self.give] * 2
            + [self.seek] * 3
            + [self.ask] * 3
        )
        events += [self.sky, self.feel, self.recall, self.recall, self.clock, self.work, self.work]
        while len(lines) < sentences:
            line = self.rng.choice(events)()
            if (
                line and line not in lines[-6:]
            ):  # an event that is impossible right now tells nothing
                lines.append(line)
        return " ".join(lines)

    def where(self, place: str) -> str:
        return f"{WHERE[place]} the {place}"

    def named(self, thing: str) -> str:
        return f"{self.colour[thing]} {thing}"

    def who(self, person: str) -> str:
        """The person's name, or a pronoun where the last sentence was about the same person."""
        known, self.last = self.last == person, person
        if known and self.rng.random() < 0.7:
            return "She" if person in WOMEN else "He"
        return person

    def pick(self, pairs: list[tuple[str, str]]) -> tuple[str, str]:
        return self.rng.choice(pairs) if pairs else ("", "")

    def walk(self) -> str:
        person = self.rng.choice(self.people)
        place = self.rng.choice([place for place in self.places if place != self.at[person]])
        self.at[person] = place
        verb = self.rng.choice(("walked to", "went to", "ran to", "hurried to"))
        return f"{self.who(person)} {verb} the {place}."

    def take(self) -> str | None:
        person, thing = self.pick(
            [(p, t) for p in self.people for t in self.things if self.lies[t] == self.at[p]]
        )
        if person:
            self.lies[thing] = person
            verb = self.rng.choice(("picked up", "took", "found"))
            return f"{self.who(person)} {verb} the {self.named(thing)}."
        return None

    def drop(self) -> str | None:
        person, thing = self.pick(
            [(self.lies[t], t) for t in self.things if self.lies[t] in self.people]
        )
        if person:
            self.lies[thing] = self.at[person]
            verb = self.rng.choice(("left", "put down", "dropped"))
            return (
                f"{self.who(person)} {verb} the {self.named(thing)} {self.where(self.at[person])}."
            )
        return None

    def give(self) -> str | None:
        person, thing = self.pick(
            [(self.lies[t], t) for t in self.things if self.lies[t] in self.people]
        )
        near = [p for p in self.people if person and p != person and self.at[p] == self.at[person]]
        if near:
            self.lies[thing] = taker = self.rng.choice(near)
            line = (
                f"{self.who(person)} gave the {self.named(thing)} to {taker}, and {taker} said "
                f"thank you."
            )
            self.last = taker
            return line
        return None

    def seek(self) -> str | None:
        """Someone goes and fetches a thing from where it was last put."""
        person, thing = self.pick(
            [(p, t) for p in self.people for t in self.things if self.lies[t] in WHERE]
        )
        if person and self.at[person] != self.lies[thing]:
            place = self.at[person] = self.lies[thing]
            self.lies[thing] = person
            they = "she" if person in WOMEN else "he"
            return (
                f"{self.who(person)} wanted the {thing}, so {they} went to the {place} and "
                f"found it there."
            )
        return None

    def ask(self) -> str:
        asker, other = self.rng.sample(self.people, 2)
        thing = self.rng.choice(self.things)
        spot = self.lies[thing]
        if spot in (asker, other):
            answer = "I have it" if spot == other else "You have it"
        else:
            answer = f"{spot} has it" if spot in self.people else f"It is {self.where(spot)}"
        self.last = other
        return f'"Where is the {thing}?" asked {asker}. "{answer}," said {other}.'

    def sky(self) -> str:
        if self.rng.random() < 0.6:
            return f"{WEATHER[self.weather][1]}."
        self.weather = self.rng.choice([w for w in sorted(WEATHER) if w != self.weather])
        return f"Then the weather changed. {WEATHER[self.weather][0]}."

    def feel(self) -> str:
        person = self.rng.choice(self.people)
        return f"{self.who(person)} felt {WEATHER[self.weather][2]} because of the {self.weather}."

    def recall(self) -> str:
        thing = self.rng.choice(self.things)
        spot = self.lies[thing]
        self.last = None
        if spot in self.people:
            return f"{spot} still had the {self.named(thing)}."
        return f"The {self.named(thing)} was still {self.where(spot)}."

    def clock(self) -> str | None:
        self.time += 1
        person = self.last = self.rng.choice(self.people)
        if self.time < len(TIMES):
            return f"{TIMES[self.time]}, {person} was {self.where(self.at[person])}."
        return None

    def work(self) -> str:
        person = self.rng.choice(self.people)
        name = self.who(person)
        if self.rng.random() < 0.5:
            return f"{name} was a good {self.job[person]} and everyone knew it."
        verb = self.rng.choice(
            ("sang a song", "told a story", "sat down and rested", "thought about home")
        )
        return f"{name} {verb} {self.where(self.at[person])}."


def story(rng: Random, split: str, sentences: int | None = None) -> str:
    """One story of the split, 8 to 40 sentences long unless told."""
    while True:
        candidate = Story(rng)
        if split_of(candidate.key) == split:
            return candidate.tell(sentences or rng.randint(8, 40))
