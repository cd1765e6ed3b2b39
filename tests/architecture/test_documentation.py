"""The documentation names files that exist and public names that exist."""

import re
from pathlib import Path

import pytest

import gtcompile

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
FOLDERS = ("gtcompile/", "passes/", "tools/", "benchmarks/", "tests/", "examples/", "docs/")

PLACEHOLDER = re.compile("NAME|ROOM")


def paths_named(text: str) -> set[str]:
    """Paths of the checkout in code, alone or in a command; NAME and ROOM stand for any."""
    words = " ".join(re.findall(r"`([^`\n]+)`", text)).split()
    words = [word.partition("::")[0] for word in words]
    return {
        w
        for w in words
        if w.startswith(FOLDERS) and re.fullmatch(r"[\w./]+", w) and not PLACEHOLDER.search(w)
    }


def benchmarks_named(text: str) -> set[str]:
    return set(re.findall(r"python -m (benchmarks[\w.]*)", text)) - {"benchmarks.NAME"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_and_benchmark_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    missing = [path for path in paths_named(text) if not (ROOT / path).exists()]
    modules = [name.replace(".", "/") for name in benchmarks_named(text)]
    missing += [
        m for m in modules if not (ROOT / f"{m}.py").exists() and not (ROOT / m / "__main__.py").exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_public_name_that_a_page_uses_exists(page):
    used = set(re.findall(r"\bgtcompile\.([A-Za-z_]\w*)\s*\(", page.read_text(encoding="utf-8")))
    assert not [name for name in used if not hasattr(gtcompile, name)]


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
