"""Writes are whole or not there."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gtcompile.files import write_atomically
from gtcompile.tools.common.files import (
    read_lines,
    write_folder,
    write_json,
    write_lines,
    write_text,
)


def test_a_write_that_fails_leaves_the_old_content_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_content_is_there_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    seen = []
    write_atomically(path, lambda temporary: (temporary.write_text("new"), seen.append(path.read_text()))[0])
    assert seen == ["old"]
    assert path.read_text() == "new"


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", lambda folder: (folder / "a").write_text("1"))

    def fail(folder: Path) -> None:
        (folder / "a").write_text("2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "model", fail)
    assert (tmp_path / "model" / "a").read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", lambda folder: (folder / "a").write_text("1"))
    write_folder(tmp_path / "model", lambda folder: (folder / "b").write_text("2"))
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["b"]


@pytest.mark.parametrize("failing", range(3))
def test_the_old_folder_or_the_new_one_is_there_whenever_a_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    path = tmp_path / "model"
    write_folder(path, lambda folder: (folder / "a").write_text("1"))
    steps = []

    def failing_sometimes(step: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: object, **options: object) -> None:
            steps.append(step)
            if len(steps) == failing + 1:
                raise OSError("interrupted")
            step(*arguments, **options)

        return run

    monkeypatch.setattr("os.replace", failing_sometimes(os.replace))
    monkeypatch.setattr("shutil.rmtree", failing_sometimes(shutil.rmtree))
    with contextlib.suppress(OSError):
        write_folder(path, lambda folder: (folder / "a").write_text("2"))
    assert (path / "a").read_text() in "12"


def test_a_folder_gets_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "ours", lambda folder: (folder / "a").write_text("1"))
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_and_lines_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1, 2.5]})
    write_lines(tmp_path / "b.jsonl", [{"n": 1}, {"n": 2}])
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2.5]}
    assert read_lines(tmp_path / "b.jsonl") == [{"n": 1}, {"n": 2}]
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"n": ')  # a kill cut the line off
    assert read_lines(tmp_path / "b.jsonl") == [{"n": 1}, {"n": 2}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_a_file_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
