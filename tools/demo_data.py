"""The demo's generated texts: a pretraining corpus and a summarisation task over the same small world.

In this world a few people visit places and set out to do things; some succeed and some do not. A *source* is
a report or a dialogue about two such events, one done and one not, amid unrelated remarks. Its *summary*
follows from it by one rule: the event that was done, in one sentence with its person, deed, thing, place
and day.

The pretraining corpus tells events in the same manner, tells each again in two short sentences, and asks
questions about single facts ("Where was Anna? At the harbour."). So a pretrained model has learned to read
these texts, to copy words and to tell which fact belongs to whom. That only one of the events is to be reported,
and a sentence with all of its facts, it meets in fine-tuning. No corpus text contains a summary or "TL;DR".

Every event belongs to exactly one of the pretraining, train, validation and test pools, by a hash of its
person, thing and place: no such combination is told in two of them.
"""

import random
import zlib
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    person: str
    day: str
    place: str
    deed: _Deed
    thing: str
    done: bool

    @property
    def pool(self) -> str:
        """The only pool of texts this event may appear in."""
        return _POOLS[zlib.crc32(f"{self.person} {self.thing} {self.place}".encode()) % len(_POOLS)]


def pretraining_corpus(seed: int, count: int) -> list[str]:
    """Generate texts of two lines each, easy ones first; the second line follows mostly from the first.

    The first quarter are lists to copy, the next eighth notes to copy in another order, the rest stories with
    a retelling and questions. A model that has learned to copy learns to look facts up many times faster.

    Args:
        seed: Another seed gives other texts from the same pool of events.
        count: Number of texts, at least 0.

    Returns:
        `count` texts of at most about 130 words.

    Raises:
        ValueError: `count` is negative.

    >>> pretraining_corpus(0, 8) == pretraining_corpus(0, 8)
    True
    """
    writers = [_copied_words] * (count // 5) + [_copied_notes] * (2 * count // 5)
    writers += [_retold_story] * (count - len(writers))
    return [write(rng) for write, rng in zip(writers, _generators(f"pretraining {seed}", count), strict=True)]


def summarisation_examples(split: Split, count: int) -> list[dict[str, str]]:
    """Generate sources with summaries; no event is told in two splits, nor in the pretraining corpus.

    Args:
        split: "train", "validation" or "test".
        count: Number of examples, at least 0. A longer list begins with the shorter one.

    Returns:
        `count` dictionaries with the keys "source" (about 45 to 80 words) and "target" (one sentence).

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


def _copied_words(rng: random.Random) -> str:
    words = " ".join(rng.sample((*_PEOPLE, *_PLACES, *_THINGS, *_DAYS), rng.randint(3, 12)))
    return f"List: {words}.\n {words}."


def _copied_notes(rng: random.Random) -> str:
    events = _draw_events(rng, "pretraining", [True] * rng.randint(2, 4))
    first, second = (
        " ".join(_note(rng, event) for event in rng.sample(events, len(events))) for _ in range(2)
    )
    return f"Notes: {first}\n {second}"


def _note(rng: random.Random, event: _Event) -> str:
    parts = [f"at {event.place}", f"on {event.day}", f"with {event.thing}"]
    return f"{event.person} {' '.join(rng.sample(parts, len(parts)))}."


def _retold_story(rng: random.Random) -> str:
    events = _draw_events(rng, "pretraining", [rng.random() < 0.6 for _ in range(rng.choice((2, 2, 3)))])
    retold = [sentence for event in events for sentence in _retelling(event)]
    questions = [question for event in events for question in _questions(event)]
    said = [*rng.sample(retold, len(retold)), *rng.sample(questions, min(len(questions), 5))]
    return f"{_tell(rng, events)}\n {' '.join(said)}"


def _retelling(event: _Event) -> list[str]:
    """Say again, in two sentences that name the person, where they were and what came of it."""
    visit = f"{event.person} was at the {event.place} on {event.day}."
    if event.done:
        return [visit, f"{event.person} {event.deed.past} the {event.thing}."]
    return [visit, f"{event.person} could not {event.deed.infinitive} the {event.thing}."]


def _summarisation_example(rng: random.Random, split: Split) -> dict[str, str]:
    done, failed = _draw_events(rng, split, [True, False])
    events = [done, failed] if rng.random() < 0.5 else [failed, done]
    return {"source": _tell(rng, events), "target": _summary(done)}


def _summary(event: _Event) -> str:
    return f"{event.person} {event.deed.past} the {event.thing} at the {event.place} on {event.day}."


def _draw_events(rng: random.Random, pool: str, dones: list[bool]) -> list[_Event]:
    """Draw one event per entry of `dones`, all from `pool`; nothing in them coincides."""
    events: list[_Event] = []
    while len(events) < len(dones):
        event = _draw_event(rng, done=dones[len(events)])
        if event.pool == pool and not any(_overlap(event, other) for other in events):
            events.append(event)
    return events


def _draw_event(rng: random.Random, *, done: bool) -> _Event:
    return _Event(
        person=rng.choice(_PEOPLE),
        day=rng.choice(_DAYS),
        place=rng.choice(_PLACES),
        deed=rng.choice(_DEEDS),
        thing=rng.choice(_THINGS),
        done=done,
    )


def _overlap(one: _Event, other: _Event) -> bool:
    return (
        one.person == other.person
        or one.day == other.day
        or one.place == other.place
        or one.deed == other.deed
        or one.thing == other.thing
    )


def _tell(rng: random.Random, events: list[_Event]) -> str:
    return rng.choice((_report, _dialogue))(rng, events)


def _report(rng: random.Random, events: list[_Event]) -> str:
    """Tell `events` in the third person, with remarks between their sentences."""
    told = _interleave(
        rng,
        [
            [
                _visit(rng, event, event.person),
                _outcome(rng, event, event.person, _with_adjective(rng, event)),
            ]
            for event in events
        ],
    )
    return " ".join([f"{rng.choice(_REPORT_TITLES)}:", *_with_remarks(rng, told, events)])


def _dialogue(rng: random.Random, events: list[_Event]) -> str:
    """Let the people of `events` tell each other what they did, in the first person."""
    told = _interleave(
        rng,
        [
            [
                f"{event.person}: {_visit(rng, event, 'I')}",
                f"{event.person}: {_outcome(rng, event, 'I', _with_adjective(rng, event))}",
            ]
            for event in events
        ],
    )
    return " ".join(["Chat:", *_with_remarks(rng, told, events)])


def _visit(rng: random.Random, event: _Event, subject: str) -> str:
    return rng.choice(
        (
            f"{subject} went to the {event.place} on {event.day}.",
            f"{subject} was at the {event.place} on {event.day}.",
            f"{subject} spent {event.day} at the {event.place}.",
        )
    )


def _outcome(rng: random.Random, event: _Event, subject: str, thing: str) -> str:
    deed = event.deed
    if event.done:
        return f"{subject} {rng.choice((deed.past, deed.synonym))} the {thing} there."
    return rng.choice(
        (
            f"{subject} wanted to {deed.infinitive} the {thing}, but {rng.choice(_OBSTACLES)}.",
            f"{subject} could not {deed.infinitive} the {thing}, because {rng.choice(_OBSTACLES)}.",
        )
    )


def _with_adjective(rng: random.Random, event: _Event) -> str:
    return f"{rng.choice(_ADJECTIVES)} {event.thing}"


def _with_remarks(rng: random.Random, told: list[str], events: list[_Event]) -> list[str]:
    """Put one to three remarks that matter to no event anywhere between the sentences `told`."""
    remarks = [_remark(rng, events) for _ in range(rng.randint(1, 3))]
    return _interleave(rng, [told, remarks])


def _remark(rng: random.Random, events: list[_Event]) -> str:
    bystander = rng.choice([person for person in _PEOPLE if all(person != event.person for event in events)])
    return rng.choice(
        (
            f"The morning was {rng.choice(_WEATHER)}.",
            f"{bystander} saw a {rng.choice(_ANIMALS)}.",
            f"{bystander} sent a letter to {rng.choice(events).person}.",
            f"The {rng.choice(_ANIMALS)} was asleep.",
        )
    )


def _interleave(rng: random.Random, sequences: list[list[str]]) -> list[str]:
    """Merge `sequences` at random, each in its own order."""
    owners = [index for index, sequence in enumerate(sequences) for _ in sequence]
    rng.shuffle(owners)
    iterators = [iter(sequence) for sequence in sequences]
    return [next(iterators[owner]) for owner in owners]


def _questions(event: _Event) -> list[str]:
    person, deed, thing = event.person, event.deed, event.thing
    where, when = f"At the {event.place}.", f"On {event.day}."
    asked = [
        ("Who was at the " + event.place, f"{person}."),
        (f"Where was {person}", where),
        (f"When was {person} at the {event.place}", when),
        (f"Did {person} {deed.infinitive} the {thing}", "Yes." if event.done else "No."),
    ]
    if event.done:
        asked += [
            (f"Who {deed.past} the {thing}", f"{person}."),
            (f"What did {person} do", f"{person} {deed.past} the {thing}."),
            (f"What happened to the {thing}", f"{person} {deed.past} the {thing}."),
            (f"Where did {person} {deed.infinitive} the {thing}", where),
            (f"When did {person} {deed.infinitive} the {thing}", when),
        ]
    else:
        asked += [
            (f"What did {person} want", f"To {deed.infinitive} the {thing}."),
            (f"What did {person} do", "Nothing."),
            (f"Who {deed.past} the {thing}", "Nobody."),
        ]
    return [f"{question}? {answer}" for question, answer in asked]
