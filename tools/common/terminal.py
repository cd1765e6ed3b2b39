"""Sentences in a terminal: broken between words there, one a line where another program reads them."""

import textwrap

from rich.console import Console

INDENT = 2
"""Columns by which what follows the first line of a sentence is indented."""


def say(console: Console, *lines: str) -> None:
    """Print sentences; a word longer than the terminal stays whole, so that paths can be copied.

    Args:
        console: where to; only where it is a terminal is anything broken.
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
