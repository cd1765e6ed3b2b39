"""Inductor's settings in everything that is compiled for a region."""

import threading

import pytest
import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from gtcompile import train_only
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.models import Regression, make_batch, step


class Note(CustomGraphPass):
    """A pass of the user's own that notes when it runs."""

    def __init__(self) -> None:
        self.padding: list[bool] = []
        self.threads: set[int] = set()

    def __call__(self, graph: fx.Graph) -> None:
        self.padding.append(config.shape_padding)
        self.threads.add(threading.get_ident())

    def uuid(self) -> None:
        """None, so that nothing comes from the disk cache."""


@pytest.fixture
def note():
    note = Note()
    with config.patch(post_grad_custom_post_pass=note):
        yield note


def compiled(model):
    options = {"variants": "hoisted", "cut_chains": "compile"}
    return torch.compile(model, backend="gtcompile", options=options)


def test_no_product_of_a_region_is_padded_and_what_another_thread_compiles_has_the_users_settings(note):
    model, batch = Regression(3), make_batch()
    run = compiled(model)
    step(run, batch)
    assert note.padding
    assert not any(note.padding)
    train_only(run, ["layers.2.*"])  # the backward ends in the graph, so its part is compiled now
    expected = reference_gradients(run, batch)
    note.threads.clear()
    # as on a GPU, where the backward runs in a thread of its own
    thread = threading.Thread(target=step, args=(run, batch))
    thread.start()
    thread.join()
    assert note.threads == {thread.ident}
    assert_same_gradients(run, expected, rtol=1e-4, atol=1e-6)
