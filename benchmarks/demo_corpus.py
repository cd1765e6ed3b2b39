"""The corpus that the demo's model was pretrained on, over the world of the demo's task.

It tells visits in the manner of the task, tells each again in short sentences, and asks questions about
single facts ("Where was Anna? At the harbour."). Pretraining teaches a model to read these texts, to copy
words and to distinguish a visit from the remarks around it. Fine-tuning teaches it what to report, and to
write a sentence with all facts. No corpus text contains a summary; the prompt's "TL;DR:" occurs in lists of
words to copy alone.
"""

import random
from collections.abc import Callable

from gtcompile.tools.models.demo_data import (
    DAYS,
    DEEDS,
    PEOPLE,
    PLACES,
    THINGS,
    Visit,
    draw_visit,
    generators,
    tell,
)

_DEED_WORDS = tuple(word for deed in DEEDS for word in (deed.infinitive, deed.past, deed.synonym))
_LISTED = (*PEOPLE, *PLACES, *THINGS, *DAYS, *_DEED_WORDS, "TL;DR:")


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
    """
    drawing = generators(f"pretraining {seed}", count)
    return [_writer(rng, index / count)(rng) for index, rng in enumerate(drawing)]


def _writer(rng: random.Random, position: float) -> Callable[[random.Random], str]:
    """Draw the kind of text that stands at `position` in the corpus, from 0 to 1."""
    return _copied_list if position < 1 / 6 or rng.random() < 0.1 else _retold_visit


def _copied_list(rng: random.Random) -> str:
    words = " ".join(rng.sample(_LISTED, rng.randint(3, 12)))
    return f"List: {words}.\n {words}."


def _retold_visit(rng: random.Random) -> str:
    visit, surroundings = draw_visit(rng, "pretraining")
    retold, questions = _retelling(visit), _questions(visit)
    said = [*rng.sample(retold, len(retold)), *rng.sample(questions, 5)]
    return f"{tell(rng, visit, surroundings)}\n {' '.join(said)}"


def _retelling(visit: Visit) -> list[str]:
    return [
        f"{visit.person} was at the {visit.place} on {visit.day}.",
        f"{visit.person} {visit.deed.past} the {visit.thing}.",
        f"{visit.person} could not {visit.missed_deed.infinitive} the {visit.missed_thing}.",
    ]


def _questions(visit: Visit) -> list[str]:
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
