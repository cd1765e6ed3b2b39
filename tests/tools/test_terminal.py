"""What a terminal of any width shows, and a file holds."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gtcompile.tools.common.terminal import say
from gtcompile.tools.demo import comparison
from gtcompile.tools.finetune.progress import Reporter
from gtcompile.tools.finetune.training import StoppedEarlyError

WORDS = st.lists(st.text("ab:[]/.-=", min_size=1, max_size=30), min_size=1, max_size=20)


def printed(line: str, width: int, *, terminal: bool) -> list[str]:
    file = io.StringIO()
    say(Console(file=file, width=width, force_terminal=terminal, color_system=None), line)
    return file.getvalue().splitlines()


@given(words=WORDS, width=st.integers(20, 100), indent=st.integers(0, 4))
def test_a_terminal_breaks_no_word_and_no_line_is_longer_than_it(
    words: list[str], width: int, indent: int
) -> None:
    lines = printed(" " * indent + " ".join(words), width, terminal=True)
    assert " ".join(lines).split() == words
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines)
    assert all(line.startswith(" " * indent) for line in lines)


@given(words=WORDS)
def test_a_file_gets_a_sentence_in_one_line(words: list[str]) -> None:
    assert printed(" ".join(words), 20, terminal=False) == [" ".join(words)]


def test_steps_and_figures_of_a_long_run_fit_into_eighty_columns() -> None:
    file = io.StringIO()
    reporter = Reporter(Console(file=file, width=80, force_terminal=True, color_system=None))
    with reporter.bar("training", 12450):
        step = {"step": 12345, "epoch": 4, "loss": 13.342, "seconds": 11.28}
        reporter.stepped(step, 0.486, 12450, 2490, "121 parameters")
    lines = file.getvalue().replace("\r", "\n").splitlines()
    figures = ("12345/12450", "loss 13.342", "11.28 s/step", "FLOPs 48.6%")
    assert any(all(figure in line for figure in figures) for line in lines), lines


def test_a_demo_that_is_interrupted_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise StoppedEarlyError("stopped after step 10 of 128")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparison, "compare_with_full", stopped)
    with pytest.raises(SystemExit) as left:
        comparison.main()
    assert left.value.code == 130
    assert capsys.readouterr().out.startswith("stopped after step 10 of 128; ")
