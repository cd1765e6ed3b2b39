"""The demo's summarisation task: generated texts over a small world.

In this world people visit places and set out to do things; one thing they do, another they do not get to.
A *source* is a report or a dialogue about one such visit, amid remarks that mention other people, places,
days and things. Its *summary* follows from it by one rule: what was done, in one sentence with its person,
deed, thing, place and day.

Every visit belongs to exactly one of the pretraining, train, validation and test pools, by a hash of its
person, place and thing done: no such combination is told in two of them. The corpus that the demo's model
was pretrained on is made of the first pool by `benchmarks/demo_corpus.py`.
"""

import random
import zlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]

_POOLS = ("pretraining", "train", "validation", "test")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    "Anna Omar Lena Hugo Mira Tom Nora Ivan Sara Paul Ella Karl Rosa Felix Ida Marco Julia Ben Clara Yusuf "
    "Vera Max Emma Leo Alice Simon Maya Jack Olga David"
)
PLACES = _words(
    "harbour school market garden station museum farm library castle bridge mill park church hotel"
)
THINGS = _words(
    "lamp boat kite clock chair bicycle radio fence piano door table wagon drum ladder basket mirror "
    "bench stove window tent"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_ADJECTIVES = _words("old red small heavy green broken blue wooden")
_ANIMALS = _words("dog cat horse goose fox goat")
_WEATHER = _words("cold warm windy quiet rainy sunny")
_OBSTACLES = ("there was no time", "it was too late", "the rain came", "the tools were lost")
_REPORT_TITLES = ("News", "Report", "Diary", "Story")


@dataclass(frozen=True, slots=True)
class _Deed:
    infinitive: str
    past: str
    synonym: str


DEEDS = (
    _Deed("repair", "repaired", "mended"),
    _Deed("sell", "sold", "traded"),
    _Deed("paint", "painted", "coloured"),
    _Deed("clean", "cleaned", "washed"),
    _Deed("build", "built", "made"),
    _Deed("find", "found", "discovered"),
    _Deed("buy", "bought", "purchased"),
    _Deed("move", "moved", "carried"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What one person did, and did not get to, at one place on one day."""

    person: str
    place: str
    day: str
    deed: _Deed
    thing: str
    missed_deed: _Deed
    missed_thing: str

    @property
    def pool(self) -> str:
        """The only pool of texts this visit may be told in."""
        return _POOLS[zlib.crc32(f"{self.person} {self.place} {self.thing}".encode()) % len(_POOLS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Surroundings:
    """Who and what else is mentioned; nothing of it coincides with the visit."""

    person: str
    place: str
    day: str
    thing: str


def summarisation_examples(split: Split, count: int) -> list[dict[str, str]]:
    """Generate sources with summaries; no visit is told in two splits, nor in the pretraining corpus.

    Args:
        split: "train", "validation" or "test".
        count: Number of examples, at least 0. A longer list begins with the shorter one.

    Returns:
        `count` dictionaries with the keys "source" (about 30 to 70 words) and "target" (one sentence).

    Raises:
        ValueError: `split` is none of the three, or `count` is negative.

    >>> example = summarisation_examples("test", 1)[0]
    >>> sorted(example)
    ['source', 'target']
    """
    if split not in _POOLS[1:]:
        raise ValueError(f"split is one of {', '.join(_POOLS[1:])}; got {split!r}")
    return [_summarisation_example(rng, split) for rng in generators(split, count)]


def generators(stream: str, count: int) -> list[random.Random]:
    """Make a random number generator for each of so many texts; `stream` seeds them."""
    if count < 0:
        raise ValueError(f"count is at least 0; got {count}")
    return [random.Random(f"{stream} {index}") for index in range(count)]


def _summarisation_example(rng: random.Random, split: Split) -> dict[str, str]:
    visit, surroundings = draw_visit(rng, split)
    return {"source": tell(rng, visit, surroundings), "target": _summary(visit)}


def _summary(visit: Visit) -> str:
    return f"{visit.person} {visit.deed.past} the {visit.thing} at the {visit.place} on {visit.day}."


def draw_visit(rng: random.Random, pool: str) -> tuple[Visit, _Surroundings]:
    """Draw a visit of `pool` and its surroundings."""
    while True:
        person, other_person = rng.sample(PEOPLE, 2)
        place, other_place = rng.sample(PLACES, 2)
        day, other_day = rng.sample(DAYS, 2)
        thing, missed_thing, other_thing = rng.sample(THINGS, 3)
        deed, missed_deed = rng.sample(DEEDS, 2)
        visit = Visit(
            person=person,
            place=place,
            day=day,
            deed=deed,
            thing=thing,
            missed_deed=missed_deed,
            missed_thing=missed_thing,
        )
        if visit.pool == pool:
            return visit, _Surroundings(
                person=other_person, place=other_place, day=other_day, thing=other_thing
            )


def tell(rng: random.Random, visit: Visit, surroundings: _Surroundings) -> str:
    """Tell a visit as a report or as a dialogue."""
    return rng.choice((_report, _dialogue))(rng, visit, surroundings)


def _report(rng: random.Random, visit: Visit, surroundings: _Surroundings) -> str:
    """Tell `visit` in the third person, with remarks between its sentences."""
    told = [f"{visit.person} {sentence}" for sentence in _account(rng, visit)]
    remarks = [
        f"The morning was {rng.choice(_WEATHER)}.",
        f"{surroundings.person} saw a {rng.choice(_ANIMALS)}.",
        f"{surroundings.person} sent a letter to {visit.person}.",
        f"{surroundings.person} lost the {rng.choice(_ADJECTIVES)} {surroundings.thing}.",
        f"The {surroundings.place} was closed on {surroundings.day}.",
    ]
    sentences = _interleave(rng, told, rng.sample(remarks, rng.randint(1, 3)))
    return " ".join([f"{rng.choice(_REPORT_TITLES)}:", *sentences])


def _dialogue(rng: random.Random, visit: Visit, surroundings: _Surroundings) -> str:
    """Let the person of `visit` tell another about it, who makes remarks."""
    told = [f"{visit.person}: I {sentence}" for sentence in _account(rng, visit)]
    remarks = [
        f"{surroundings.person}: How are you, {visit.person}?",
        f"{surroundings.person}: I saw a {rng.choice(_ANIMALS)}.",
        f"{surroundings.person}: I lost the {rng.choice(_ADJECTIVES)} {surroundings.thing}.",
        f"{surroundings.person}: The {surroundings.place} was closed on {surroundings.day}.",
    ]
    return " ".join(["Chat:", *_interleave(rng, told, rng.sample(remarks, rng.randint(1, 3)))])


def _account(rng: random.Random, visit: Visit) -> list[str]:
    """What `visit` consisted of, in sentences without their subject: where and when, then the rest."""
    arrival = rng.choice(
        (
            f"went to the {visit.place} on {visit.day}.",
            f"was at the {visit.place} on {visit.day}.",
            f"spent {visit.day} at the {visit.place}.",
        )
    )
    done = rng.choice((visit.deed.past, visit.deed.synonym))
    missed = f"{visit.missed_deed.infinitive} the {rng.choice(_ADJECTIVES)} {visit.missed_thing}"
    rest = [
        f"{done} the {rng.choice(_ADJECTIVES)} {visit.thing} there.",
        rng.choice(("wanted to {}, but {}.", "could not {}, because {}.")).format(
            missed, rng.choice(_OBSTACLES)
        ),
    ]
    return [arrival, *rng.sample(rest, 2)]


def _interleave(rng: random.Random, one: list[str], other: list[str]) -> list[str]:
    """Merge two lists at random, each in its own order."""
    first = [True] * len(one) + [False] * len(other)
    rng.shuffle(first)
    ones, others = iter(one), iter(other)
    return [next(ones if is_first else others) for is_first in first]
