"""The demo's generated texts: a pretraining corpus and a summarisation task over the same small world.

In this world people visit places and set out to do things; one thing they do, another they do not get to.
A *source* is a report or a dialogue about one such visit, amid remarks that mention other people, places,
days and things. Its *summary* follows from it by one rule: what was done, in one sentence with its person,
deed, thing, place and day.

The pretraining corpus tells visits in the same manner, tells each again in short sentences, and asks
questions about single facts ("Where was Anna? At the harbour."). Pretraining teaches a model to read these
texts, to copy words and to distinguish a visit from the remarks around it. Fine-tuning teaches it what to
report, and to write a sentence with all facts. No corpus text contains a summary; the prompt's
"TL;DR:" occurs in lists of words to copy alone.

Every visit belongs to exactly one of the pretraining, train, validation and test pools, by a hash of its
person, place and thing done: no such combination is told in two of them.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]

_POOLS = ("pretraining", "train", "validation", "test")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_PEOPLE = _words(
    "Anna Omar Lena Hugo Mira Tom Nora Ivan Sara Paul Ella Karl Rosa Felix Ida Marco Julia Ben Clara Yusuf "
    "Vera Max Emma Leo Alice Simon Maya Jack Olga David"
)
_PLACES = _words(
    "harbour school market garden station museum farm library castle bridge mill park church hotel"
)
_THINGS = _words(
    "lamp boat kite clock chair bicycle radio fence piano door table wagon drum ladder basket mirror "
    "bench stove window tent"
)
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
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


_DEEDS = (
    _Deed("repair", "repaired", "mended"),
    _Deed("sell", "sold", "traded"),
    _Deed("paint", "painted", "coloured"),
    _Deed("clean", "cleaned", "washed"),
    _Deed("build", "built", "made"),
    _Deed("find", "found", "discovered"),
    _Deed("buy", "bought", "purchased"),
    _Deed("move", "moved", "carried"),
)
_DEED_WORDS = tuple(word for deed in _DEEDS for word in (deed.infinitive, deed.past, deed.synonym))
_LISTED = (*_PEOPLE, *_PLACES, *_THINGS, *_DAYS, *_DEED_WORDS, "TL;DR:")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Visit:
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


def pretraining_corpus(seed: int, count: int) -> list[str]:
    """Generate texts of two lines each; the second line follows from the first, for the most part.

    The first sixth are lists to copy, the rest mostly visits with a retelling and questions. Copying is the
    first step to looking a fact up, and lists teach it soonest.

    Args:
        seed: Another seed gives other texts from the same pool of visits.
        count: Number of texts, at least 0.

    Returns:
        `count` texts of at most about 110 words.

    Raises:
        ValueError: `count` is negative.

    >>> pretraining_corpus(0, 8) == pretraining_corpus(0, 8)
    True
    """
    generators = _generators(f"pretraining {seed}", count)
    return [_writer(rng, index / count)(rng) for index, rng in enumerate(generators)]


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
    return [_summarisation_example(rng, split) for rng in _generators(split, count)]


def _generators(stream: str, count: int) -> list[random.Random]:
    if count < 0:
        raise ValueError(f"count is at least 0; got {count}")
    return [random.Random(f"{stream} {index}") for index in range(count)]


def _writer(rng: random.Random, position: float) -> Callable[[random.Random], str]:
    """Draw the kind of text that stands at `position` in the corpus, from 0 to 1."""
    return _copied_list if position < 1 / 6 or rng.random() < 0.1 else _retold_visit


def _copied_list(rng: random.Random) -> str:
    words = " ".join(rng.sample(_LISTED, rng.randint(3, 12)))
    return f"List: {words}.\n {words}."


def _retold_visit(rng: random.Random) -> str:
    visit, surroundings = _draw(rng, "pretraining")
    retold, questions = _retelling(visit), _questions(visit)
    said = [*rng.sample(retold, len(retold)), *rng.sample(questions, 5)]
    return f"{_tell(rng, visit, surroundings)}\n {' '.join(said)}"


def _summarisation_example(rng: random.Random, split: Split) -> dict[str, str]:
    visit, surroundings = _draw(rng, split)
    return {"source": _tell(rng, visit, surroundings), "target": _summary(visit)}


def _summary(visit: _Visit) -> str:
    return f"{visit.person} {visit.deed.past} the {visit.thing} at the {visit.place} on {visit.day}."


def _draw(rng: random.Random, pool: str) -> tuple[_Visit, _Surroundings]:
    """Draw a visit of `pool` and its surroundings."""
    while True:
        person, other_person = rng.sample(_PEOPLE, 2)
        place, other_place = rng.sample(_PLACES, 2)
        day, other_day = rng.sample(_DAYS, 2)
        thing, missed_thing, other_thing = rng.sample(_THINGS, 3)
        deed, missed_deed = rng.sample(_DEEDS, 2)
        visit = _Visit(
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


def _tell(rng: random.Random, visit: _Visit, surroundings: _Surroundings) -> str:
    return rng.choice((_report, _dialogue))(rng, visit, surroundings)


def _report(rng: random.Random, visit: _Visit, surroundings: _Surroundings) -> str:
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


def _dialogue(rng: random.Random, visit: _Visit, surroundings: _Surroundings) -> str:
    """Let the person of `visit` tell another about it, who makes remarks."""
    told = [f"{visit.person}: I {sentence}" for sentence in _account(rng, visit)]
    remarks = [
        f"{surroundings.person}: How are you, {visit.person}?",
        f"{surroundings.person}: I saw a {rng.choice(_ANIMALS)}.",
        f"{surroundings.person}: I lost the {rng.choice(_ADJECTIVES)} {surroundings.thing}.",
        f"{surroundings.person}: The {surroundings.place} was closed on {surroundings.day}.",
    ]
    return " ".join(["Chat:", *_interleave(rng, told, rng.sample(remarks, rng.randint(1, 3)))])


def _account(rng: random.Random, visit: _Visit) -> list[str]:
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


def _retelling(visit: _Visit) -> list[str]:
    return [
        f"{visit.person} was at the {visit.place} on {visit.day}.",
        f"{visit.person} {visit.deed.past} the {visit.thing}.",
        f"{visit.person} could not {visit.missed_deed.infinitive} the {visit.missed_thing}.",
    ]


def _questions(visit: _Visit) -> list[str]:
    person, deed, missed_deed = visit.person, visit.deed, visit.missed_deed
    thing, missed_thing = f"the {visit.thing}", f"the {visit.missed_thing}"
    where, when = f"At the {visit.place}.", f"On {visit.day}."
    return [
        f"Who was at the {visit.place}? {person}.",
        f"Where was {person}? {where}",
        f"When was {person} at the {visit.place}? {when}",
        f"Who {deed.past} {thing}? {person}.",
        f"What did {person} do? {person} {deed.past} {thing}.",
        f"What happened to {thing}? {person} {deed.past} {thing}.",
        f"Where did {person} {deed.infinitive} {thing}? {where}",
        f"When did {person} {deed.infinitive} {thing}? {when}",
        f"Did {person} {deed.infinitive} {thing}? Yes.",
        f"Did {person} {missed_deed.infinitive} {missed_thing}? No.",
        f"Who {missed_deed.past} {missed_thing}? Nobody.",
        f"What did {person} want? To {missed_deed.infinitive} {missed_thing}.",
    ]
