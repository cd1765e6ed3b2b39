"""Match parameter names with shell-style patterns, and suggest names for a misspelled one."""

import difflib
import fnmatch
from collections.abc import Iterable


def match_patterns(names: Iterable[str] | dict[str, str], patterns: Iterable[str]) -> frozenset[str]:
    """Return the names that match any of the patterns.

    Args:
        names: the names to choose from, or a dictionary from each name or alias to the name to return for it.
        patterns: exact names or shell-style patterns (`*`, `?`, `[...]`), matched on whole names.

    Raises:
        ValueError: a pattern matches nothing; the message lists the names closest to it.
        TypeError: `patterns` is a single string, is no collection, or contains something else than strings.
    """
    refuse_string(patterns)
    if not isinstance(patterns, Iterable):
        raise TypeError(f"expected a collection of FQNs or shell-style patterns, got {patterns!r}")
    canonical = names if isinstance(names, dict) else {name: name for name in names}
    matched: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"expected FQNs or shell-style patterns, got a {type(pattern).__name__}")
        found = [pattern] if pattern in canonical else fnmatch.filter(canonical, pattern)
        if not found:
            raise ValueError(f"{pattern!r} matches no selectable parameter; {near_names(pattern, canonical)}")
        matched.update(canonical[name] for name in found)
    return frozenset(matched)


def refuse_string(names: object) -> None:
    """Refuse a single string where several names are expected: it would be read letter by letter.

    Raises:
        TypeError: `names` is a string.
    """
    if isinstance(names, str):
        raise TypeError(
            f"expected a collection of names or patterns, got the string {names!r}; write [{names!r}]"
        )


def near_names(name: str, names: Iterable[str]) -> str:
    """List the names closest to a misspelled one, for an error message."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f"near names: {', '.join(near)}" if near else f"names look like {next(iter(names), 'nothing')}"
