"""Losses that compute weight gradients in the forward: a frozen head computes none, as in eager PyTorch."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gtcompile import backward_costs, train_only
from gtcompile.graph.flops import count_flops

ROWS, WIDTH, CLASSES = 8, 6, 10
PRODUCT = 2 * ROWS * WIDTH * CLASSES
"""FLOPs of the logits, and of the gradient of the rows, and of the head."""
SETS = (["body.*", "head.*"], ["body.*"], ["head.weight"], ["body.bias", "head.bias"], ["body.bias"])


def in_chunks(rows: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """The operator of torch, which has a flag for each gradient."""
    options = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options")
    chosen = options.LinearCrossEntropyOptions(batch_chunk_size=3, allow_retain_graph=True)
    return nn.functional.linear_cross_entropy(
        rows, head.weight, targets, linear_bias=head.bias, options=chosen
    )


class _Fused(torch.autograd.Function):
    """Computes all gradients in the forward, as fused losses of other libraries do."""

    @staticmethod
    def forward(ctx: Any, rows, weight, bias, targets):
        logits = rows @ weight.t() + bias
        slopes = torch.softmax(logits, -1) - nn.functional.one_hot(targets, CLASSES)
        slopes = slopes / len(rows)
        wanted = ctx.needs_input_grad
        rows_gradient = slopes @ weight if wanted[0] else None
        weight_gradient = slopes.t() @ rows if wanted[1] else None
        ctx.save_for_backward(rows_gradient, weight_gradient, slopes.sum(0) if wanted[2] else None)
        return nn.functional.cross_entropy(logits, targets)

    @staticmethod
    def backward(ctx: Any, gradient):
        return *(None if saved is None else saved * gradient for saved in ctx.saved_tensors), None


def fused(rows: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = _Fused.apply(rows, head.weight, head.bias, targets)
    return loss


class Headed(nn.Module):
    """A layer, and a head inside the loss."""

    def __init__(self, loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss, self.body, self.head = loss, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.loss(torch.tanh(self.body(x)), self.head, targets)
        return loss


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(ROWS, WIDTH), "targets": torch.arange(ROWS) % CLASSES}


def counted_step(model: nn.Module, given: dict[str, torch.Tensor], counter: Any) -> int:
    model.zero_grad()
    with counter as counted:
        model(**given).backward()
    return int(counted.get_total_flops())


@pytest.mark.parametrize("loss", [in_chunks, fused])
@pytest.mark.parametrize("variants", ["specialized", "hoisted"])
def test_a_set_costs_what_it_costs_in_eager_pytorch(loss, variants):
    model, given = Headed(loss), batch()
    costs, twin = backward_costs(model, given), copy.deepcopy(model)
    run = torch.compile(model, backend="gtcompile", options={"compiler": "eager", "variants": variants})
    for patterns in SETS:
        trained = train_only(run, patterns)
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name in trained)
        eager = counted_step(twin, given, FlopCounterMode(display=False))
        assert counted_step(run, given, count_flops()) == costs.step_flops(trained) == eager
        for name, parameter in twin.named_parameters():
            gradient = model.get_parameter(name).grad
            assert (gradient is None) == (parameter.grad is None) == (name not in trained)
            if gradient is not None:
                torch.testing.assert_close(gradient, parameter.grad)


def test_the_products_of_the_loss_are_counted_one_by_one():
    costs = backward_costs(Headed(in_chunks), batch())
    body = 2 * ROWS * WIDTH * WIDTH
    assert costs.forward_flops == body + PRODUCT
    assert costs.step_flops({"head.bias"}) == costs.forward_flops
    assert costs.step_flops({"head.weight"}) == costs.forward_flops + PRODUCT
    assert costs.step_flops({"body.bias"}) == costs.forward_flops + PRODUCT
    assert costs.full_flops == 2 * body + 3 * PRODUCT


def test_hoisted_variants_say_that_such_a_loss_is_compiled_anew_for_each_set(caplog):
    run = torch.compile(
        Headed(in_chunks), backend="gtcompile", options={"compiler": "eager", "variants": "hoisted"}
    )
    with caplog.at_level(logging.WARNING, "gtcompile"):
        run(**batch()).backward()
    assert sum("compiled anew for each trained set" in record.message for record in caplog.records) == 1


class Remembering(Headed):
    """Also returns a state that nobody differentiates."""

    def __init__(self) -> None:
        super().__init__(in_chunks)
        self.state = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> Any:
        return super().forward(x, targets), self.state(torch.tanh(self.body(x)))


@pytest.mark.parametrize("variants", ["specialized", "hoisted"])
def test_beside_such_a_loss_an_unused_output_has_no_gradient(variants):
    model, given = Remembering(), batch()
    run = torch.compile(model, backend="gtcompile", options={"compiler": "eager", "variants": variants})
    for _ in range(3):  # the first backward finds out what is not used
        model.zero_grad()
        run(**given)[0].backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(**given)[0].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (found[name] is None) == name.startswith("state")
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("loss", [in_chunks, fused])
@pytest.mark.parametrize("variants", ["specialized", "hoisted"])
@pytest.mark.long
def test_generated_code_computes_the_same_gradients(loss, variants):
    model, given = Headed(loss), batch()
    twin = copy.deepcopy(model)
    run = torch.compile(model, backend="gtcompile", options={"variants": variants})
    for patterns in SETS[1:4]:
        trained = train_only(run, patterns)
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name in trained)
        twin.zero_grad()
        twin(**given).backward()
        counted_step(run, given, count_flops())
        for name, parameter in twin.named_parameters():
            gradient = model.get_parameter(name).grad
            assert (gradient is None) == (parameter.grad is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, parameter.grad)
