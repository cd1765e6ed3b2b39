"""split_dropout: the mask is eager PyTorch's, the products are nodes of the graph."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from gtcompile.passes.dropout import split_dropout
from gtcompile.torch_internals import inductor_config
from tests.models import Recipe, make_batch

aten = torch.ops.aten


def drop(value: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    dropped, mask = aten.native_dropout.default(value.relu(), rate, True)
    again, _ = aten.native_dropout.default(dropped, rate, True)
    return again, mask


def eager(value: torch.Tensor, rate: float) -> torch.Tensor:
    return functional.dropout(functional.dropout(value.relu(), rate), rate)


def traced(value: torch.Tensor, rate: float, tracing_mode: str = "fake") -> fx.GraphModule:
    module = make_fx(functools.partial(drop, rate=rate), tracing_mode=tracing_mode)(value)
    split_dropout(module.graph)
    module.graph.lint()
    module.recompile()
    return module


def dropouts(module: fx.GraphModule) -> int:
    return len(module.graph.find_nodes(op="call_function", target=aten.native_dropout.default))


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    rate=st.floats(0.0, 1.0),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_a_split_dropout_is_bit_equal_to_eager(shape, rate, dtype, seed):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    module = traced(value, rate)
    assert dropouts(module) == (2 if 0 in shape else 0)
    torch.manual_seed(seed)
    expected = eager(value, rate)
    torch.manual_seed(seed)
    _, expected_mask = drop(value, rate)
    torch.manual_seed(seed)
    for found, reference in zip(module(value), (expected, expected_mask), strict=True):
        assert torch.equal(found, reference)
        assert found.dtype == reference.dtype


def test_sizes_that_change_are_asked_of_the_tensor():
    module = traced(torch.ones(3, 4), 0.5, tracing_mode="symbolic")
    assert dropouts(module) == 0
    value = torch.ones(5, 7)
    torch.manual_seed(0)
    expected = eager(value, 0.5)
    torch.manual_seed(0)
    assert torch.equal(module(value)[0], expected)


@pytest.mark.parametrize(
    "value",
    [torch.ones(3, 4).t(), torch.ones(3, 4, device="meta")],
    ids=["another order of memory", "another device"],
)
def test_what_draws_in_another_order_is_left_alone(value):
    assert dropouts(traced(value, 0.5)) == 2


def operators_of_a_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> set[str]:
    model(**batch).backward()
    with torch.profiler.profile() as profile:
        model(**batch).backward()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("variants", ["hoisted", "specialized"])
def test_generated_code_draws_masks_and_calls_no_dropout(variants):
    batch = make_batch()
    run = torch.compile(Recipe(("dropout",) * 2).model(), backend="gtcompile", options={"variants": variants})
    called = operators_of_a_step(run, batch)
    assert "aten::bernoulli_" in called
    assert "aten::native_dropout" not in called


def test_a_last_pass_of_the_users_own_keeps_its_place():
    seen: list[fx.Graph] = []
    with inductor_config.patch(post_grad_custom_post_pass=seen.append):
        run = torch.compile(Recipe(("dropout",)).model(), backend="gtcompile")
        called = operators_of_a_step(run, make_batch())
    assert seen
    assert "aten::native_dropout" in called
