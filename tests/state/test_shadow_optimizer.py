"""The shadow steps as the optimizer would, and the optimizer notices nothing."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gtcompile.state.shadow_optimizer import ShadowOptimizer
from tests.support.optimizers import state_bytes


def rates():
    return st.floats(1e-4, 0.5)


OPTIMIZERS = st.one_of(
    st.builds(
        lambda lr, decay, **flags: lambda ps: torch.optim.AdamW(ps, lr=lr, weight_decay=decay, **flags),
        rates(),
        rates(),
        amsgrad=st.booleans(),
        maximize=st.booleans(),
        foreach=st.booleans(),
    ),
    st.builds(
        lambda lr, momentum, decay, nesterov: (
            lambda ps: torch.optim.SGD(ps, lr=lr, momentum=momentum, weight_decay=decay, nesterov=nesterov)
        ),
        rates(),
        st.floats(0.1, 0.9),
        rates(),
        st.booleans(),
    ),
    st.builds(lambda lr, alpha: lambda ps: torch.optim.RMSprop(ps, lr=lr, alpha=alpha), rates(), rates()),
    st.builds(
        lambda lr, decay: lambda ps: torch.optim.Adafactor(ps, lr=lr, weight_decay=decay), rates(), rates()
    ),
)


def make_parameters(*shapes):
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(OPTIMIZERS, st.integers(0, 3), st.integers(0, 2**31))
def test_the_shadow_steps_bit_for_bit_as_the_optimizer_itself_then_does(make, steps, seed):
    torch.manual_seed(seed)
    parameters = make_parameters((3, 4), (5,), ())
    optimizer = make(parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
    gradients = [torch.randn(parameter.shape) for parameter in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    before = [p.detach().clone() for p in parameters]
    shadow = ShadowOptimizer(optimizer)
    predicted = [shadow.stepped(p, g.clone()) for p, g in zip(parameters, gradients, strict=True)]
    updates = [shadow.updates({p: g.clone()})[p] for p, g in zip(parameters, gradients, strict=True)]
    assert_same(optimizer.state_dict(), state)
    assert_same(parameters, before)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert_same(predicted, parameters)
    assert_same(updates, [p.detach() - b for p, b in zip(parameters, before, strict=True)])


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0, check_stride=False)


def test_a_wrapper_around_an_optimizer_is_looked_through():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            pytest.fail("the wrapper stepped")

    (parameter,) = make_parameters((2,))
    shadow = ShadowOptimizer(Wrapper(torch.optim.SGD([parameter], lr=1.0)))
    assert shadow.owns(parameter)
    assert shadow.updates({parameter: torch.ones(2)})[parameter].tolist() == pytest.approx([-1.0, -1.0])


def test_attributes_that_a_rule_keeps_on_itself_are_there():
    class Scaled(torch.optim.SGD):
        def __init__(self, parameters, scale):
            super().__init__(parameters, lr=1.0)
            self.scale = scale

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(self.scale)
            return super().step(closure)

    (parameter,) = make_parameters((2,))
    update = ShadowOptimizer(Scaled([parameter], scale=3.0)).updates({parameter: torch.ones(2)})[parameter]
    assert update.tolist() == pytest.approx([-3.0, -3.0])


def test_a_rate_of_zero_is_used_as_it_is_where_no_scheduler_left_another():
    moving, still = make_parameters((2,), (2,))
    optimizer = torch.optim.SGD([{"params": [moving]}, {"params": [still], "lr": 0.0}], lr=1.0)
    shadow = ShadowOptimizer(optimizer)
    assert shadow.updates({moving: torch.ones(2)})[moving].any()
    assert not shadow.updates({still: torch.ones(2)})[still].any()


def test_parameters_of_another_optimizer_are_not_owned():
    mine, other = make_parameters((2,), (2,))
    shadow = ShadowOptimizer(torch.optim.SGD([mine], lr=1.0))
    assert shadow.owns(mine)
    assert not shadow.owns(other)


class Halved(torch.Tensor):
    """A tensor kept in another in half precision, that as a whole can do nothing: what 8-bit moments are."""

    @staticmethod
    def __new__(cls, part):
        return torch.Tensor._make_wrapper_subclass(cls, part.shape, dtype=torch.float32)

    def __init__(self, part):
        self.part = part

    def __tensor_flatten__(self):
        return ["part"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["part"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


class HalvedMomentum(torch.optim.Optimizer):
    """SGD with momentum, the momentum in half precision."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                state.setdefault("moment", Halved(torch.zeros_like(parameter, dtype=torch.bfloat16)))
                state["moment"].part.mul_(0.9).add_(parameter.grad)
                parameter.sub_(group["lr"] * state["moment"].part.float())


def test_moments_made_of_other_tensors_are_copied_and_counted_by_their_parts():
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = HalvedMomentum([weight])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    moment, value = optimizer.state[weight]["moment"].part.clone(), weight.detach().clone()
    predicted = ShadowOptimizer(optimizer).updates({weight: torch.ones(4, 4)})[weight]
    assert torch.equal(optimizer.state[weight]["moment"].part, moment)
    assert torch.equal(weight, value)
    optimizer.step()
    torch.testing.assert_close(weight - value, predicted)
    assert state_bytes(optimizer, weight) == 4 * 4 * 2


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_an_8_bit_optimizer_of_torchao_is_measured_like_any():
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    weight = nn.Parameter(torch.ones(64, 128))
    optimizer = optim.AdamW8bit([weight], lr=1e-2)
    gradient = torch.linspace(-1, 1, weight.numel()).view_as(weight)
    for _ in range(2):
        value, predicted = (
            weight.detach().clone(),
            ShadowOptimizer(optimizer).updates({weight: gradient})[weight],
        )
        weight.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(weight - value, predicted)
    assert state_bytes(optimizer, weight) < weight.nbytes
