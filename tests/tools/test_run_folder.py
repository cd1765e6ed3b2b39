"""The folder of a run belongs to one run and one process."""

from contextlib import closing
from pathlib import Path

import pytest

from gtcompile.tools.runs.run_folder import RunFolder
from gtcompile.tools.runs.settings import Settings

SETTINGS = Settings(model="demo", dataset="demo")


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file/run cannot be made: .*file is a file"):
        RunFolder(tmp_path / "file" / "run").check_new()
    RunFolder(tmp_path / "a" / "b").check_new()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_second_run_cannot_begin_in_a_folder_where_one_goes_on(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.check_new()
    second.check_new()
    with closing(first), closing(second):
        first.begin(SETTINGS, {"examples": "a"})
        with pytest.raises(ValueError, match="another process is writing"):
            second.begin(SETTINGS, {})
        with pytest.raises(ValueError, match="another process is writing"):
            second.hold()
        first.close()
        with pytest.raises(ValueError, match=r"another run has started.*--output"):
            second.begin(SETTINGS, {})
    second.hold()
    second.close()


def test_a_run_is_not_continued_on_other_examples(tmp_path: Path) -> None:
    with closing(RunFolder(tmp_path / "run")) as folder:
        folder.begin(SETTINGS, {"examples": "a"})
        folder.check_same_run(SETTINGS, "a")
        with pytest.raises(ValueError, match="began with other examples"):
            folder.check_same_run(SETTINGS, "b")
