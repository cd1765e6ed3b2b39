"""An output depends on a parameter along what autograd differentiates, and the backward ends accordingly."""

import pytest
import torch
from torch import nn

from gtcompile import backward_costs, compile_blocks, train_only
from gtcompile.graph.flops import count_flops
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.models import random_sets

WIDTH = 8


class VectorQuantiser(nn.Module):
    """Replaces each row by the nearest code: by `argmin`, and straight through for the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(16, WIDTH))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        distances = x.pow(2).sum(-1, True) - 2 * x @ self.codes.T + self.codes.pow(2).sum(-1)
        nearest = self.codes[distances.argmin(-1)]
        return x + (nearest - x).detach(), (nearest - x.detach()).square().mean()


class StraightThrough(nn.Module):
    """Rounds to the signs of a projection, whose gradient only the second output has."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        projected = self.project(x)
        return x + (projected.sign() - x).detach(), projected.square().mean()


class TargetNetwork(nn.Module):
    """Predicts what a second network says, which is not differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            target = self.target(x)
        return x + target, (self.online(x) - target).square().mean()


class Router(nn.Module):
    """Picks an expert for every row by comparing scores, and balances them by a loss of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.scores(x)
        first = (scores[:, :1] > scores[:, 1:]).to(x.dtype)
        mixed = first * self.experts[0](x) + (1 - first) * self.experts[1](x)
        return x + mixed, scores.softmax(-1).mean(0).square().sum()


class WrittenInPlace(nn.Module):
    """Writes a trained value into a buffer that did not require grad when it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.zeros(len(x) + 1, WIDTH)
        view = rows[1:]
        view.copy_(self.inner(x))
        return x + rows[1:], self.unused(x).detach().square().mean() + x.square().mean()


class Between(nn.Module):
    """Such a block between a layer and some compiled ones."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.middle = nn.Linear(WIDTH, WIDTH), kind()
        self.decoder = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, extra = self.middle(self.encoder(x))
        for layer in self.decoder:
            x = torch.tanh(layer(x))
        return self.head(x).square().mean() + extra


KINDS = (VectorQuantiser, StraightThrough, TargetNetwork, Router, WrittenInPlace)
BLOCKS = ["encoder", "middle", "decoder.0", "decoder.1", "decoder.2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variants", ["hoisted", pytest.param("specialized", marks=pytest.mark.long)])
def test_counted_flops_are_those_predicted_and_gradients_those_of_eager_freezing(kind, variants):
    model, batch = Between(kind), {"x": torch.randn(6, WIDTH)}
    compile_blocks(model, blocks=BLOCKS, compiler="eager", variants=variants)
    costs = backward_costs(model, batch)
    model(**batch).backward()
    of_block = sorted(name for name in costs.fqns if name.startswith("middle"))
    for trained in (*random_sets(sorted(costs.fqns), 2), {*of_block, "head.weight"}):
        train_only(model, trained)
        expected = reference_gradients(model, batch)
        model.zero_grad()
        with count_flops() as counter:
            model(**batch).backward()
        assert counter.get_total_flops() == costs.step_flops(trained)
        assert_same_gradients(model, expected)


@pytest.mark.parametrize("kind", [VectorQuantiser, StraightThrough])
def test_a_parameter_behind_detach_keeps_no_block_above_from_running_without_autograd(kind):
    model, batch = Between(kind), {"x": torch.randn(6, WIDTH)}
    compile_blocks(model, blocks=BLOCKS, compiler="eager")
    model(**batch).backward()
    train_only(model, ["middle.*"])
    passed_on, own_loss = model.middle(model.encoder(batch["x"]))
    assert not passed_on.requires_grad
    assert own_loss.requires_grad
