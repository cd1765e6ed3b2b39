"""Operators that check for errors in the backward train, and only what is trained is checked."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gtcompile import train_only
from gtcompile.testing import assert_same_gradients, reference_gradients

aten = torch.ops.aten


class Spectrum(nn.Module):
    """Eigenvalues, whose backward solves a system of equations and checks that it could."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix, self.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(4))

    def forward(self) -> torch.Tensor:
        return (torch.linalg.eigvals(self.matrix).abs() * self.scale).sum()


class Called(TorchDispatchMode):
    """The operators that were called, in compiled code too."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[object] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("variants", ["specialized", "hoisted"])
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_what_checks_for_errors_in_its_backward_trains(variants, compiler):
    model = Spectrum()
    run = torch.compile(model, backend="gtcompile", options={"compiler": compiler, "variants": variants})
    for trained in (None, ["scale"], ["matrix"]):
        train_only(run, trained)
        expected = reference_gradients(run, {})
        model.zero_grad()
        run().backward()
        tolerance = {} if compiler == "eager" else {"rtol": 1e-4, "atol": 1e-6}
        assert_same_gradients(model, expected, **tolerance)
        with Called() as called:
            run().backward()
        solves = aten._linalg_solve_ex.default in called.operators
        assert solves == (trained != ["scale"])
