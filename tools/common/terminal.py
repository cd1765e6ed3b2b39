"""Print sentences: wrapped between words on a terminal, one per line for another program."""

import textwrap

from rich.console import Console

INDENT = 2
"""Indentation of the second and later lines of a sentence."""


def say(console: Console, *lines: str) -> None:
    """Print sentences; a word longer than the terminal stays whole, so that paths can be copied.

    Args:
        console: where to print; only a terminal gets wrapped lines.
        *lines: sentences; their own line breaks and indentation are kept.
    """
    for line in "\n".join(lines).split("\n") if lines else ():
        text = _wrapped(line, console.width) if console.is_terminal else line
        console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _wrapped(line: str, width: int) -> str:
    text = line.lstrip()
    indent = line[: len(line) - len(text)]
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + " " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
