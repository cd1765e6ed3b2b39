"""Where the backward ends, and who may want that what comes out asks for a gradient all the same."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gtcompile.compiler.cuts import cut, end, is_cut, keep_asking, keeps_asking
from gtcompile.compiler.forced_leaves import wants_gradient


@pytest.fixture
def askers():
    """Two models in their first forward."""
    pair = object(), object()
    yield pair
    for asker in pair:
        keep_asking(asker, False)


def test_a_cut_has_the_values_asks_for_a_gradient_and_wants_none():
    tensor = torch.ones(2, requires_grad=True) * 2
    passed = cut(tensor)
    assert passed.requires_grad
    assert passed.data_ptr() == tensor.data_ptr()
    assert is_cut(passed)
    assert not wants_gradient(passed)
    assert not wants_gradient(passed.clone())
    passed.mul_(2)  # a leaf could not be written into
    assert tensor.tolist() == [4.0, 4.0]
    passed.sum().backward()
    assert not is_cut(tensor)
    assert wants_gradient(tensor)


def test_one_model_ends_its_first_forward_while_another_is_in_it(askers):
    tensor = torch.ones(2, requires_grad=True) * 2
    assert not end(tensor).requires_grad
    for asker in askers:
        keep_asking(asker, True)
    keep_asking(askers[0], False)
    assert end(tensor).requires_grad
    keep_asking(askers[1], False)
    assert not end(tensor).requires_grad


def test_a_first_forward_is_one_threads_own(askers):
    keep_asking(askers[0], True)
    with ThreadPoolExecutor(1) as thread:
        assert not thread.submit(keeps_asking).result()
    assert keeps_asking()
