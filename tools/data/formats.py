"""The known datasets: how a record becomes a text with its answers, and how answers are scored.

The prompts are those of the GreenTrainer paper. Two things are added: an end-of-sequence token after the
answer, and all references of a record.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Record = Mapping[str, Any]
Metric = Literal["rouge", "exact match", "accuracy"]

END = "</s>"
"""Stands for the tokenizer's end-of-sequence token in prompts."""


@dataclass(frozen=True, slots=True)
class Example:
    """One text with all accepted answers. Training uses the first one."""

    source: str | tuple[tuple[str, str], ...]
    """The text that the model reads, cut at its end if it is too long; of a chat, the role and the text of
    every message before the answer."""
    references: tuple[str, ...]
    """Accepted answers, at least one."""
    wrong: tuple[str, ...] = ()
    """Wrong answers to choose the right one from; empty where an answer is generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFormat:
    """How the records of one dataset become examples, and how answers to them are scored."""

    name: str
    """Name for `--dataset`."""
    read: Callable[[Record], Example]
    """Makes an example of a record; raises `ValueError` if a field is missing."""
    cue: str
    """Text after the source in a decoder's prompt; never cut. An encoder-decoder has none."""
    joint: str
    """Text between cue and answer."""
    metric: Metric
    """ROUGE-1/2/L with the best reference, equality with any reference, or how often the right one of given
    answers is chosen."""
    max_new_tokens: int
    """Most tokens of an answer."""
    file_splits: tuple[str, str] = ("train", "test")
    """Names of the training and evaluation splits in the authors' files."""
    hub_splits: tuple[str, str] = ("train", "test")
    """Names of the training and evaluation splits on the hub."""
    hub: Mapping[str, str] = field(default_factory=dict)
    """Arguments of `datasets.load_dataset`."""
    package_folder: str = ""
    """Folder with the authors' files inside of a package from PyPI, such as `aclsum/dataset`."""
    note: str = ""
    """A remark for readers of the scores."""


def value_of(record: Record, name: str) -> Any:
    """The value of a required field.

    Raises:
        ValueError: listing the fields that the record has.
    """
    if name not in record:
        raise ValueError(f"no field {name!r}; it has {', '.join(map(repr, record))}")
    return record[name]


def _texts(value: Any, name: str) -> tuple[str, ...]:
    """The texts of one field, which holds a string or a list of strings; blank ones are left out."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected text in field {name!r}, got {value!r}")
    filled = tuple(text for text in texts if text.strip())
    if not filled:
        raise ValueError(f"field {name!r} holds no text")
    return filled


def read_fields(record: Record, source: str, target: str) -> Example:
    """Make an example of two fields: one or more sentences, and one or more references."""
    sentences = _texts(value_of(record, source), source)
    return Example(" ".join(sentences), _texts(value_of(record, target), target))


def read_chat(record: Record) -> Example:
    """Make an example of a chat in the field `messages`: the answer is its last message."""
    messages = value_of(record, "messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError(f"expected messages, each with role and content as text, got {messages!r}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"expected at least two messages, the last one with the role assistant, got {messages!r}"
        )
    *before, answer = [(message["role"], message["content"]) for message in messages]
    return Example(tuple(before), _texts(answer[1], "messages"))


def _is_message(message: Any) -> bool:
    """Parts of several kinds, as of images, and calls of tools are no text that a tokenizer could take."""
    return isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))


def _read_scitldr(record: Record) -> Example:
    return read_fields(record, "source", "target")


def _read_aclsum(record: Record) -> Example:
    sentences, summaries = value_of(record, "sentences"), value_of(record, "summary")
    return Example(" ".join(value_of(sentences, "abstract")), (value_of(summaries, "outcome"),))


def _read_dialogsum(record: Record) -> Example:
    several = tuple(record[name] for name in ("summary1", "summary2", "summary3") if record.get(name))
    references = several or _texts(value_of(record, "summary"), "summary")
    dialogue = _texts(value_of(record, "dialogue"), "dialogue")
    return Example(" ".join(dialogue), references)


def _read_webquestions(record: Record) -> Example:
    question = record.get("qText") or value_of(record, "question")
    return Example(f"question:{question}", _texts(value_of(record, "answers"), "answers"))


def _piqa_fields(record: Record) -> tuple[str, tuple[str, str], int]:
    """The goal, the two solutions, and which of them is right."""
    goal, first, second, label = (value_of(record, name) for name in ("goal", "sol1", "sol2", "label"))
    if label not in (0, 1):
        raise ValueError(
            f"label {label!r}: the answers of this split are hidden, so it can be neither learned nor scored"
        )
    return goal, (first, second), label


def _read_piqa(record: Record) -> Example:
    goal, (first, second), label = _piqa_fields(record)
    return Example(f"goal:{goal}{END}sol1:{first}{END}sol2:{second}", (str(label),))


def _read_piqa_solution(record: Record) -> Example:
    goal, solutions, label = _piqa_fields(record)
    right, wrong = solutions[label].strip(), solutions[1 - label].strip()
    return Example(f"Question: {goal.strip()}", (right,), (wrong,))


def summarisation(
    name: str, read: Callable[[Record], Example], max_new_tokens: int, hub: Mapping[str, str] | None = None
) -> TaskFormat:
    """The paper's summarisation prompt: `{source} TL;DR: {summary}`."""
    return TaskFormat(
        name=name,
        read=read,
        cue=" TL;DR:",
        joint=" ",
        metric="rouge",
        max_new_tokens=max_new_tokens,
        hub=hub or {},
    )


def format_of_fields(
    name: str, source: str | None, target: str | None, hub: Mapping[str, str] | None = None
) -> TaskFormat:
    """The format of data of one's own: a text and a summary by their fields, or a chat in `messages`.

    Args:
        name: of the data.
        source: field of the text; None takes `source`, or a chat if there is one and no `target` either.
        target: field of the answer; None takes `target`.
        hub: arguments of `datasets.load_dataset`.
    """

    def read(record: Record) -> Example:
        if source is target is None and "messages" in record:
            return read_chat(record)
        return read_fields(record, source or "source", target or "target")

    return summarisation(name, read, 64, hub)


_DEMO_NOTE = (
    "The demo's texts are generated: short reports and dialogues about a made-up world. Each mentions one "
    "deed that was done and one that was not; the summary is one sentence about the first. The model was "
    "pretrained on other texts of that world and has not seen the task. The figures show what a budget "
    "costs, and say nothing about natural text."
)

# Hub datasets that are scripts have been converted by the hub, on a revision of this name.
_CONVERTED = "refs/convert/parquet"

FORMATS: dict[str, TaskFormat] = {
    task.name: task
    for task in (
        replace(summarisation("demo", _read_scitldr, 24), note=_DEMO_NOTE),
        summarisation(
            "scitldr",
            _read_scitldr,
            64,
            hub={"path": "allenai/scitldr", "revision": _CONVERTED, "data_dir": "Abstract"},
        ),
        replace(summarisation("aclsum", _read_aclsum, 48), package_folder="aclsum/dataset"),
        summarisation("dialogsum", _read_dialogsum, 128, hub={"path": "knkarthick/dialogsum"}),
        TaskFormat(
            name="webquestions",
            read=_read_webquestions,
            cue=f"{END}answer:",
            joint="",
            metric="exact match",
            max_new_tokens=32,
            file_splits=("trainmodel", "test"),
            hub={"path": "stanfordnlp/web_questions"},
        ),
        TaskFormat(
            name="piqa",
            read=_read_piqa,
            cue=f"{END}label:",
            joint="",
            metric="exact match",
            max_new_tokens=4,
            file_splits=("train", "valid"),
            hub_splits=("train", "validation"),
            hub={"path": "ybisk/piqa", "revision": _CONVERTED, "data_dir": "plain_text"},
        ),
    )
}
"""The datasets known by name."""

PIQA_SOLUTIONS = replace(
    FORMATS["piqa"],
    read=_read_piqa_solution,
    cue="\nAnswer:",
    joint=" ",
    metric="accuracy",
    max_new_tokens=64,
)
"""PIQA as text: the right solution is learned, and the likelier one is the answer. The paper's format, above,
learns the label."""
