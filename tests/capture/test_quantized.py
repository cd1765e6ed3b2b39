"""Bases in 4 and 8 bits: their layers are captured, cost what they take, and stay as they were."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gtcompile import AdaptiveBackprop, backward_costs, compile_blocks, train_only
from gtcompile.graph.flops import count_flops
from gtcompile.testing import assert_same_gradients, reference_gradients

WIDTH = 64


class Scales:
    """What a quantized weight needs to be used: one scale per row, scaled once more."""

    def __init__(self, scales: torch.Tensor, nested: "Scales | None" = None) -> None:
        self.scales, self.nested = scales, nested


Scales.__module__ = "bitsandbytes.stand_in"


class Quantized(nn.Parameter):
    """A weight of bytes, with its scales in an attribute."""

    scales: Scales


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scales: Scales) -> torch.Tensor:
        ctx.weight, ctx.scales = weight, scales
        return x @ _dense(weight, scales).t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ _dense(ctx.weight, ctx.scales), None, None


def _dense(weight: torch.Tensor, scales: Scales) -> torch.Tensor:
    assert scales.nested is not None
    rows = scales.scales.clone()
    rows *= scales.nested.scales
    return weight * rows


class StandIn(nn.Linear):
    """A linear layer with a weight in 8 bits, built as bitsandbytes builds them."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)
        self.weight = Quantized(torch.randint(-9, 9, (width, width), dtype=torch.int8), requires_grad=False)
        self.weight.scales = Scales(torch.rand(width, 1), Scales(torch.rand(())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Product.apply(x, self.weight, self.weight.scales)
        return product


def four_bits(width: int) -> nn.Module:
    """The layer of bitsandbytes itself, where the package is installed."""
    library = pytest.importorskip("bitsandbytes")
    layer: nn.Module = library.nn.Linear4bit(
        width, width, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    return layer.to("cpu")


class Block(nn.Module):
    """A frozen quantized layer and a trainable adapter of low rank."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.base = layer(WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.base(x) + self.b(self.a(x)))


class Model(nn.Module):
    def __init__(self, layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(layer) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return (x - y).square().mean()


LAYERS = pytest.mark.parametrize("layer", [StandIn, four_bits])


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4, WIDTH), "y": torch.randn(4, WIDTH)}


@LAYERS
def test_costs_are_what_eager_pytorch_takes_for_every_set(layer):
    model, given = Model(layer), batch()
    costs = backward_costs(model, given)
    assert {p.status for p in costs.parameters if p.fqn.endswith("base.weight")} == {"frozen by user"}
    for trained in (costs.fqns, {"blocks.2.b.weight"}, {"blocks.1.a.weight", "blocks.2.b.weight"}):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        with FlopCounterMode(display=False) as counter:
            model(**given).backward()
        assert counter.get_total_flops() == costs.step_flops(trained)


@LAYERS
def test_a_capture_leaves_the_layer_as_it_was(layer):
    model, given = Model(layer), batch()
    expected, weight = model(**given), model.blocks[0].base.weight
    names, buffers = [n for n, _ in model.named_parameters()], dict(model.named_buffers())
    scales = vars(weight).get("scales") or vars(weight)["quant_state"]
    backward_costs(model, given)
    assert model.blocks[0].base.weight is weight
    assert scales in vars(weight).values()
    assert ([n for n, _ in model.named_parameters()], dict(model.named_buffers())) == (names, buffers)
    assert torch.equal(model(**given), expected)


@LAYERS
def test_a_selection_trains_what_it_says_and_costs_what_it_says(layer):
    model, given = compile_blocks(Model(layer), compiler="eager"), batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    selection = AdaptiveBackprop(model, optimizer, budget_fraction=0.8).reselect([given, batch()])
    train_only(model, selection.trained)
    expected = reference_gradients(model, given)
    with count_flops() as counter:
        model(**given).backward()
    assert_same_gradients(model, expected)
    assert counter.get_total_flops() == selection.step_flops <= selection.budget_flops
