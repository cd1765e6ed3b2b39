"""Writes are whole or not there; state comes back."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gtcompile.capture.rng import random_state, restore_random_state
from gtcompile.tools.common.files import (
    write_atomically,
    write_folder,
    write_json,
    write_lines,
    write_text,
)
from gtcompile.tools.runs.checkpoints import load_checkpoint, save_checkpoint


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


def test_json_and_lines_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1, 2.5]})
    write_lines(tmp_path / "b.jsonl", [{"n": 1}, {"n": 2}])
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2.5]}
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == [
        {"n": 1},
        {"n": 2},
    ]


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(()).item()]


def test_random_generators_continue_from_a_checkpoint(tmp_path: Path) -> None:
    draw()
    save_checkpoint(tmp_path / "c.pt", {"random": random_state()})
    expected = draw()
    restore_random_state(load_checkpoint(tmp_path / "c.pt")["random"])
    assert draw() == expected


def test_a_checkpoint_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to resume: no checkpoint"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.long
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A process that writes one checkpoint after another is killed at twenty random moments."""
    code = """
import sys
from pathlib import Path
import torch
from gtcompile.tools.runs.checkpoints import save_checkpoint
path = Path(sys.argv[1])
first = int(sys.argv[2])
for number in range(first, first + 10**9):
    save_checkpoint(path, {"number": number, "values": torch.full((50_000,), float(number))})
    print(number, flush=True)
"""
    path, chance, last = tmp_path / "state", random.Random(0), 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(last + 1)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        written = int(process.stdout.readline())
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        written = max([written, *(int(line) for line in process.communicate()[0].split())])
        state = load_checkpoint(path)
        assert state["number"] in (written, written + 1)  # killed before or after it said so
        assert bool((state["values"] == state["number"]).all())
        last = state["number"]


def test_a_file_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
