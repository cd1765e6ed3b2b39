"""Public bug reports of people who freeze, adapt or compile, tried with gtcompile (`docs/operators.md`)."""

import copy
from collections.abc import Callable
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


class Doubling(torch.autograd.Function):
    """Doubles, in its backward, a buffer that its forward reads."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (factor,) = ctx.saved_tensors
        factor.mul_(2.0)
        return gradient * factor, None


class SamePlaceTwice(torch.autograd.Function):
    """Has different gradients for its two arguments."""

    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        return left * right

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        left, _right = ctx.saved_tensors
        return None, gradient * left


class WritesInForward(torch.autograd.Function):
    """Adds in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        result = 2 * x
        result += bias
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * gradient, gradient.sum(0)


class HalvesGradients(torch.autograd.Function):
    """Returns its argument itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient / 2


class OneOfTwo(torch.autograd.Function):
    """Gets None as the gradient of an unused output."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, sine: torch.Tensor | None, cosine: torch.Tensor | None) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        result = torch.zeros_like(x)
        if sine is not None:
            result = result + sine * x.cos()
        return result if cosine is None else result - cosine * x.sin()


class UsesFunction(nn.Module):
    """Two layers with an autograd function between them."""

    factor: torch.Tensor

    def __init__(self, function: Callable[["UsesFunction", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.body, self.head, self.bias = nn.Linear(4, 4), nn.Linear(4, 2), nn.Parameter(torch.randn(4))
        self.register_buffer("factor", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.function(self, self.body(x))).square().mean() + self.bias.sum()


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda model, x: Doubling.apply(x, model.factor), id="pytorch#177213"),
        pytest.param(lambda model, x: SamePlaceTwice.apply(x, x), id="pytorch#181146"),
        pytest.param(
            lambda model, x: WritesInForward.apply(x, model.bias),
            id="pytorch#180642",
            marks=pytest.mark.skipif(
                torch.__version__ < "2.13", reason="Dynamo itself captures it wrong, whatever the backend"
            ),
        ),
        pytest.param(lambda model, x: HalvesGradients.apply(x), id="pytorch#102970"),
        pytest.param(lambda model, x: OneOfTwo.apply(x)[0], id="pytorch#106391"),
    ],
)
def test_autograd_functions_train_and_write_as_in_eager_pytorch(variants, function):
    model, x = UsesFunction(function), torch.randn(3, 4)
    twin, run = copy.deepcopy(model), compiled(model, variants)
    for patterns in (["*"], ["head.weight"], ["body.bias"], ["bias", "body.weight"]):
        trained = train_only(run, patterns)
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name in trained)
        for _ in range(2):
            for each, call in ((model, run), (twin, twin)):
                each.zero_grad()
                call(x).backward()
            found, expected = gradients(model), gradients(twin)
            assert found.keys() == expected.keys() == trained
            for name in trained:
                torch.testing.assert_close(found[name], expected[name])
            assert torch.equal(model.factor, twin.factor)
