"""Datasets become examples, and bad ones are refused."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gtcompile.tools.data.formats import END, FORMATS, Example, read_chat
from gtcompile.tools.data.tasks import (
    Source,
    Task,
    find_source,
    merge_references,
    parse_split,
    read_file,
    read_folder,
)
from gtcompile.tools.data.tasks import load_task as load_task_of

Write = Callable[[str, list[dict[str, Any]]], Path]


def load_task(dataset: str, limits: tuple[int | None, int | None] = (None, None), **where: Any) -> Task:
    return load_task_of(find_source(dataset, **where), limits)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes records to a file of the data folder, in the format its name says; returns the folder."""

    def write(name: str, records: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(json.dumps(record) for record in records)
        path.write_text(json.dumps(records) if path.suffix == ".json" else lines, "utf-8")
        return tmp_path

    return write


SCITLDR = [{"source": ["One.", " ", "Two."], "target": ["a", "b"]}, {"source": ["Three."], "target": ["c"]}]


def test_the_data_of_aclsum_come_from_their_package(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    paper = {"sentences": {"abstract": ["One.", "Two."]}, "summary": {"outcome": "Three.", "challenge": "-"}}
    write("aclsum/dataset/train.jsonl", [paper])
    folder = write("aclsum/dataset/test.jsonl", [paper])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install aclsum"):
        find_source("aclsum")
    monkeypatch.undo()
    (folder / "aclsum/__init__.py").touch()
    monkeypatch.syspath_prepend(folder)
    assert load_task("aclsum").train == (Example("One. Two.", ("Three.",)),)


def test_scitldr_joins_sentences_and_keeps_every_reference(write: Write) -> None:
    write("scitldr/train.jsonl", SCITLDR)
    folder = write("scitldr/test.jsonl", SCITLDR)
    task = load_task("scitldr", data_dir=folder)
    assert task.evaluation == (Example("One. Two.", ("a", "b")), Example("Three.", ("c",)))


def test_the_data_folder_may_be_that_of_the_dataset_itself(write: Write) -> None:
    write("scitldr/train.jsonl", SCITLDR)
    folder = write("scitldr/test.jsonl", SCITLDR)
    assert (
        load_task("scitldr", data_dir=folder / "scitldr").train == load_task("scitldr", data_dir=folder).train
    )


def test_dialogsum_collects_the_three_references_of_its_test_split(write: Write) -> None:
    write("dialogsum/train.jsonl", [{"dialogue": "Hi", "summary": "s"}])
    several = {"dialogue": "Ho", "summary1": "x", "summary2": "y", "summary3": "z"}
    folder = write("dialogsum/test.jsonl", [several])
    task = load_task("dialogsum", data_dir=folder)
    assert task.train == (Example("Hi", ("s",)),)
    assert task.evaluation == (Example("Ho", ("x", "y", "z")),)


def test_webquestions_reads_the_authors_list_of_answers(write: Write) -> None:
    records = [{"qText": "who?", "answers": ["Ann", "Bo"]}]
    write("webquestions/trainmodel.json", records)
    folder = write("webquestions/test.json", records)
    assert load_task("webquestions", data_dir=folder).train == (Example("question:who?", ("Ann", "Bo")),)


PIQA = [{"goal": f"g{n}", "sol1": "x", "sol2": "y"} for n in range(10)]


def test_piqa_takes_its_labels_from_the_list_beside_the_records(write: Write) -> None:
    folder = write("piqa/valid.jsonl", PIQA)
    (folder / "piqa" / "valid-labels.lst").write_text("\n".join("0101010101"))
    task = load_task("piqa", data_dir=folder, splits=("valid[:80%]", "valid[80%:]"))
    assert [len(task.train), len(task.evaluation)] == [8, 2]
    assert task.train[1] == Example(f"goal:g1{END}sol1:x{END}sol2:y", ("1",))


def test_a_number_of_labels_that_does_not_fit_is_refused(write: Write) -> None:
    folder = write("piqa/valid.jsonl", PIQA)
    (folder / "piqa" / "valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(ValueError, match="2 labels for 10 records"):
        read_folder(folder / "piqa", "piqa", "valid")


def test_labels_that_are_no_numbers_are_refused_with_the_name_of_their_file(write: Write) -> None:
    folder = write("piqa/valid.jsonl", PIQA)
    labels = folder / "piqa" / "valid-labels.lst"
    labels.write_text("\n".join("01010101x1"))
    with pytest.raises(ValueError, match=f"{labels}: expected whole numbers as labels, got 'x'"):
        read_folder(folder / "piqa", "piqa", "valid")


@pytest.mark.parametrize("hidden", [-1, None])
def test_hidden_labels_are_never_learned_or_scored(hidden: int | None) -> None:
    with pytest.raises(ValueError, match="hidden"):
        FORMATS["piqa"].read({**PIQA[0], "label": hidden})


def test_a_missing_split_is_named_with_those_that_are_there(write: Write) -> None:
    write("dialogsum/dev.jsonl", [{"dialogue": "Hi", "summary": "s"}])
    folder = write("dialogsum/test.jsonl", [{"dialogue": "Hi", "summary": "s"}])
    with pytest.raises(ValueError, match=r"no 'train' split; it has dev, test.*--train-split"):
        load_task("dialogsum", data_dir=folder)
    assert len(load_task("dialogsum", data_dir=folder, splits=("dev", None)).train) == 1


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data-dir: no folder .*nowhere"):
        load_task("scitldr", data_dir=tmp_path / "nowhere")


def test_splits_that_share_records_are_refused(write: Write) -> None:
    folder = write("scitldr/train.jsonl", SCITLDR)
    with pytest.raises(ValueError, match="would share records"):
        load_task("scitldr", data_dir=folder, splits=("train[:60%]", "train[50%:]"))
    with pytest.raises(ValueError, match="would share records"):
        load_task("some/data", splits=("all[:50%]", "validation"))


def test_a_file_has_no_split_but_all(write: Write) -> None:
    folder = write("own.jsonl", [{"source": "a", "target": "b"}] * 20)
    with pytest.raises(ValueError, match=r"own.jsonl has one split, all, .* got 'train'"):
        load_task(str(folder / "own.jsonl"), splits=("train[:90%]", "train[90%:]"))


def test_a_json_lines_file_is_split_nine_to_one(write: Write) -> None:
    folder = write("own.jsonl", [{"text": f"t{n}", "answer": "a"} for n in range(20)])
    task = load_task(str(folder / "own.jsonl"), fields=("text", "answer"))
    assert [len(task.train), len(task.evaluation)] == [18, 2]
    assert task.evaluation[0] == Example("t18", ("a",))


def test_a_missing_field_is_named_with_the_record_and_those_that_are_there(write: Write) -> None:
    folder = write("own.jsonl", [{"text": "t"}] * 2)
    with pytest.raises(ValueError, match=r"own\.jsonl, record 1: no field 'source'; it has 'text'"):
        load_task(str(folder / "own.jsonl"), splits=("all[:50%]", "all[50%:]"))


@pytest.mark.parametrize("value", [3, ["a", 3], None, "  ", []])
def test_a_field_without_text_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="'target'"):
        FORMATS["scitldr"].read({"source": "s", "target": value})


def test_fields_are_refused_for_a_dataset_that_has_its_own() -> None:
    with pytest.raises(ValueError, match="scitldr has its own fields"):
        load_task("scitldr", fields=("a", "b"))


@pytest.mark.parametrize("name", ["nonesuch", "missing.jsonl"])
def test_an_unknown_dataset_lists_the_known(name: str) -> None:
    with pytest.raises(ValueError, match="demo, scitldr, aclsum, dialogsum, webquestions, piqa"):
        load_task(name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n'),
        ("x.json", b'[{"a": "caf\xe9"}]'),
        ("x.csv", b"source,target\na,b\nc,d,e\n"),
        ("x.parquet", b"no parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(
    name: str, content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} cannot be read: \S") as raised:
        read_file(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_wrong_record_is_named_with_its_file_and_number(write: Write) -> None:
    folder = write("own.jsonl", [{"source": "s", "target": "t"}] * 19 + [{"source": "s", "target": " "}])
    with pytest.raises(ValueError, match=r"own\.jsonl, record 20: field 'target' holds no text"):
        load_task(str(folder / "own.jsonl"))


def test_a_column_of_dates_alone_is_refused_and_not_rewritten(write: Write) -> None:
    folder = write("own.jsonl", [{"source": "When?", "target": "2020-01-01"}] * 2)
    with pytest.raises(ValueError, match=r"record 1: expected text in field 'target', got datetime"):
        load_task(str(folder / "own.jsonl"))


@settings(max_examples=8)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"])).filter(str.strip), min_size=2, max_size=4
    ),
    mark=st.sampled_from(["utf-8", "utf-8-sig"]),
)
@example(texts=["1", "2.50"], mark="utf-8")
@example(texts=["NA", "null", ""], mark="utf-8-sig")
def test_a_file_of_any_kind_gives_back_any_text(
    texts: list[str], mark: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    records = [{"source": text, "target": text} for text in texts]
    folder = tmp_path_factory.mktemp("own[1]")
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (folder / "x.jsonl").write_bytes(lines.encode(mark))
    (folder / "x.json").write_bytes(json.dumps(records, ensure_ascii=False).encode(mark))
    with (folder / "x.csv").open("w", encoding=mark, newline="") as file:
        rows = csv.DictWriter(file, ["source", "target"], quoting=csv.QUOTE_ALL)
        rows.writeheader()
        rows.writerows(records)
    datasets.Dataset.from_list(records).to_parquet(folder / "x.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert read_file(folder / f"x.{kind}") == records, kind


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_file_of_one_of_these_kinds_is_a_dataset_and_an_empty_one_is_refused(
    kind: str, tmp_path: Path
) -> None:
    text = {"jsonl": '{"source": "a", "target": "b"}\n' * 2, "csv": "source,target\na,b\na,b\n"}
    text["json"] = json.dumps([{"source": "a", "target": "b"}] * 2)
    path = tmp_path / f"own.{kind}"
    path.write_text(text[kind])
    assert load_task(str(path)).train == (Example("a", ("b",)),)
    path.write_text("[]" if kind == "json" else "")
    with pytest.raises(ValueError, match=rf"own\.{kind} holds no record"):
        load_task(str(path))


def test_limits_take_the_first_examples_of_each_split() -> None:
    whole, limited = load_task("demo"), load_task("demo", limits=(3, 2))
    assert (limited.train, limited.evaluation) == (whole.train[:3], whole.evaluation[:2])


def test_the_hub_is_asked_for_what_is_not_in_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(**arguments: str) -> list[dict[str, Any]]:
        asked.append((arguments["path"], arguments["split"]))
        return [{"question": arguments["split"], "answers": ["a"]}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = load_task("webquestions")
    assert asked == [("stanfordnlp/web_questions", "train"), ("stanfordnlp/web_questions", "test")]
    assert task.evaluation == (Example("question:test", ("a",)),)


def test_a_hub_out_of_reach_says_how_to_use_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(**_: str) -> None:
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"could not load split 'train' .*\(offline\).*--data-dir"):
        load_task("piqa")


def test_rows_that_share_a_source_become_one_example_with_all_references() -> None:
    rows = [Example("a", ("x",)), Example("b", ("y",)), Example("a", ("z", "x"))]
    assert merge_references(rows) == (Example("a", ("x", "z")), Example("b", ("y",)))


@pytest.mark.parametrize("text", ["", "train[", "train[:200%]", "train[50%:50%]", "train[1:2]", "a b"])
def test_a_split_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_split(text)


@given(percent=st.integers(1, 99), count=st.integers(1, 200))
def test_two_shares_that_meet_hold_every_record_once(percent: int, count: int) -> None:
    records = [{"source": str(n), "target": "a"} for n in range(count)]
    splits = (f"x[:{percent}%]", f"x[{percent}%:]")
    form = FORMATS["scitldr"]
    source = Source(dataset="x", format=form, splits=splits, read=lambda split: (split, records))
    if 0 < count * percent // 100 < count:
        task = load_task_of(source)
        texts = [example.source for example in (*task.train, *task.evaluation)]
        assert texts == [record["source"] for record in records]
    else:
        with pytest.raises(ValueError, match="has no record in"):
            load_task_of(source)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 50))
def test_splits_are_refused_where_they_have_a_record_in_common(start: int, other: int, width: int) -> None:
    one, two = (range(begin, min(begin + width, 100)) for begin in (start, other))
    splits = tuple(f"train[{share.start}%:{share.stop}%]" for share in (one, two))
    if set(one) & set(two):
        with pytest.raises(ValueError, match="would share records"):
            find_source("demo", splits=splits)
    else:
        assert find_source("demo", splits=splits).splits == splits


def test_a_dataset_of_the_hub_is_read_by_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(**arguments: str) -> list[dict[str, Any]]:
        asked.append(arguments)
        return [{"text": arguments["split"], "summary": "s"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = load_task("some/data:english", fields=("text", "summary"), splits=(None, "validation"))
    assert asked == [{"path": "some/data", "name": "english", "split": s} for s in ("train", "validation")]
    assert task.train == (Example("train", ("s",)),)


CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]


def test_a_chat_ends_with_the_answer(write: Write) -> None:
    folder = write("own.jsonl", [{"messages": CHAT}] * 2)
    task = load_task(str(folder / "own.jsonl"), splits=("all[:50%]", "all[50%:]"))
    assert task.train == (Example((("user", "Who?"),), ("Ann.",)),)
    folder = write("own.jsonl", [{"messages": CHAT[:1]}] * 2)
    with pytest.raises(ValueError, match="record 1: expected at least two messages"):
        load_task(str(folder / "own.jsonl"))


@pytest.mark.parametrize(
    "message", ["Who?", {"role": "user"}, {"role": "user", "content": [{"type": "text"}]}]
)
def test_messages_that_are_no_text_are_refused(message: object) -> None:
    with pytest.raises(ValueError, match="expected messages, each with role and content as text"):
        read_chat({"messages": [message, *CHAT]})


def test_texts_that_are_evaluated_and_trained_on_are_counted() -> None:
    example = Example("a", ("x",))
    other = Example("b", ("x",))
    task = Task(format=FORMATS["demo"], train=(example,), evaluation=(example, other), origin="")
    assert task.duplicates == 1
