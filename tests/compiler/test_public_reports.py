"""Public bug reports of people who freeze, adapt or compile, tried with gtcompile (`docs/operators.md`)."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gtcompile import train_only

pytestmark = pytest.mark.parametrize("variants", ["specialized", "hoisted"])


def compiled(model: nn.Module, variants: str) -> Any:
    return torch.compile(model, backend="gtcompile", options={"compiler": "eager", "variants": variants})


def perceptron(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class EnablesGradients(nn.Module):
    """A forward with gradients, wherever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return self.head(torch.tanh(self.body(x))).square().mean()


def test_enable_grad_under_no_grad_gives_gradients(variants):
    """pytorch/pytorch#114338."""
    model, x = EnablesGradients(), torch.randn(3, 4)
    model(x).backward()
    expected = gradients(model)
    run = compiled(model, variants)
    for patterns in (["*"], ["head.*"], ["body.bias"]):
        trained = train_only(run, patterns)
        model.zero_grad()
        with torch.no_grad():
            loss = run(x)
        assert loss.requires_grad
        loss.backward()
        found = gradients(model)
        assert found.keys() == trained
        assert all(torch.equal(found[name], expected[name]) for name in trained)


def test_a_discriminator_runs_on_detached_and_on_attached_samples(variants):
    """pytorch/pytorch#91542."""
    generator, discriminator, noise = perceptron(4), perceptron(1), torch.randn(3, 4)

    def train(generate, judge) -> list[dict[str, torch.Tensor]]:
        found = []
        generator.zero_grad()
        samples = generate(noise)
        for given in (samples.detach(), samples):
            discriminator.zero_grad()
            judge(given).mean().backward()
            found += [gradients(generator), gradients(discriminator)]
        return found

    expected = train(generator, discriminator)
    judge = compiled(discriminator, variants)
    for patterns in (["*"], ["2.bias"]):
        trained = train_only(judge, patterns)
        found = train(compiled(generator, variants), judge)
        expected[1::2] = [{name: one[name] for name in trained} for one in expected[1::2]]
        for got, wanted in zip(found, expected, strict=True):
            assert got.keys() == wanted.keys()
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_averaged_weights_are_evaluated_and_swapped_out_again(variants):
    """wandb/senpai#3303."""
    model, x = perceptron(2), torch.randn(3, 4)
    run = compiled(model, variants)
    train_only(run, ["2.*"])
    run(x).sum().backward()
    live = copy.deepcopy(model.state_dict())
    averaged = {name: value / 2 for name, value in live.items()}
    for values in (averaged, live):
        model.load_state_dict(values)
        with torch.no_grad():
            assert torch.equal(run(x), model(x))
    model.zero_grad()
    run(x).sum().backward()
    assert gradients(model).keys() == {"2.weight", "2.bias"}
