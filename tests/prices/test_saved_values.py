"""Bytes saved for the backward, predicted from the joint graph and measured with autograd's hooks."""

import pytest
import torch

from gtcompile import compile_blocks, train_only
from gtcompile.costs.dependency_graph import capture_everything
from gtcompile.costs.explain import saved_bytes as read_by_backward
from gtcompile.costs.prices import make_price
from gtcompile.prices.saved_values import EVERYTHING, compiled_parts, saved_values
from gtcompile.tools.common.step_memory import saved_bytes as measured_bytes
from tests.prefix.test_prefix_costs import make_batches, make_llama
from tests.support.models import random_sets


@pytest.fixture(scope="module")
def joint():
    return capture_everything(make_llama(), make_batches(1, rows=2, tokens=24)[0], None)


def test_without_compiled_parts_it_is_what_the_backward_reads(joint):
    price = make_price(0, saved_values(joint))
    for trained in [joint.live, *random_sets(sorted(joint.live), 8, seed=0)]:
        assert price.of(trained) == read_by_backward(joint, trained)


def test_compiled_blocks_save_what_is_predicted_within_two_percent(joint):
    model, batch = make_llama(), make_batches(1, rows=2, tokens=24)[0]
    compile_blocks(model, compiler="eager")
    price = make_price(0, saved_values(joint, compiled_parts(model)))
    for trained in [joint.live, *random_sets(sorted(joint.live), 4, seed=1)]:
        train_only(model, trained)
        measured = measured_bytes(lambda: model(**batch).loss, model)
        assert price.of(trained) == pytest.approx(measured, rel=0.02)


def test_the_compiled_parts_are_the_blocks_or_the_whole_model():
    model = make_llama()
    assert compiled_parts(model) == ()
    assert compiled_parts(torch.compile(model, backend="eager")) == EVERYTHING
    compile_blocks(model, compiler="eager")
    assert compiled_parts(model) == tuple(f"model.layers.{index}" for index in range(5))
