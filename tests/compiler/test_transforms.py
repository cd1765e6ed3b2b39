"""The transforms of `torch.func` work through compiled blocks, which run eagerly there."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from gtcompile import compile_blocks, train_only
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.models import Recipe, captures

X, Y = torch.randn(4, 6, 8), torch.randn(4, 6, 8)


def gradient_of_the_head(model: nn.Module) -> torch.Tensor:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    call = lambda weight: functional_call(model, {**weights, "head.weight": weight}, (X, Y))  # noqa: E731
    return grad(call)(weights["head.weight"])


def gradients_per_sample(model: nn.Module) -> torch.Tensor:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    call = lambda w, x, y: functional_call(model, w, (x[None], y[None]))  # noqa: E731
    return vmap(grad(call), in_dims=(None, 0, 0))(weights, X, Y)["layers.0.up.weight"]


def directional_derivative(model: nn.Module) -> torch.Tensor:
    return jvp(lambda x: model(x, Y), (X,), (torch.ones_like(X),))[1]


@pytest.mark.parametrize("transform", [gradient_of_the_head, gradients_per_sample, directional_derivative])
@pytest.mark.parametrize("trained", [None, ["layers.1.*"]])
def test_transforms_give_what_they_give_of_plain_models(transform, trained):
    recipe = Recipe(("residual", "residual"))
    model, batch = compile_blocks(recipe.model(), compiler="eager"), {"x": X, "y": Y}
    train_only(model, trained)
    model(**batch).backward()
    seen = captures()
    torch.testing.assert_close(transform(model), transform(recipe.model()), rtol=0, atol=0)
    model.zero_grad()
    expected = reference_gradients(model, batch)
    model(**batch).backward()
    assert_same_gradients(model, expected)
    assert captures() == seen
