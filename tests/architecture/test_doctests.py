"""The examples in docstrings are true."""

import doctest
import importlib

import pytest

from tests.architecture.test_layering import SOURCES

WITH_EXAMPLES = [module for module, path in SOURCES.items() if ">>>" in path.read_text("utf-8")]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings_print_what_they_say(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0
