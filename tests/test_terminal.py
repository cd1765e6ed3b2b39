"""Sentences in a terminal of any width, and in a file."""

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gtcompile.tools.terminal import say

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
