"""Gradients come one at a time, whole, and are let go of."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from gtcompile import GTCompileError
from gtcompile.importance import gradient_stream
from gtcompile.importance.gradient_stream import GradientStream, NotFiniteError
from gtcompile.state.host_memory import await_copy


class Deep(nn.Module):
    """Ten layers; `checkpointed` runs them in segments that share one more weight."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(10))
        self.shared = nn.Parameter(torch.ones(4))
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            segment = lambda x, layer=layer: torch.tanh(layer(x)) * self.shared  # noqa: E731
            x = segment(x) if self.reentrant is None else checkpoint(segment, x, use_reentrant=self.reentrant)
        return x.sum()


def stream_of(module):
    return GradientStream(module, {p: fqn for fqn, p in module.named_parameters()})


def test_no_more_gradients_are_alive_than_one_operator_makes():
    module, storages, alive = Deep(), [], []

    def consume(fqn, parameter, gradient, finite):
        storages.append(StorageWeakRef(gradient.untyped_storage()))
        alive.append(sum(not storage.expired() for storage in storages))

    stream_of(module).run({"x": torch.ones(2, 4)}, consume)
    assert len(storages) == 21
    assert max(alive) <= 2  # a linear layer's backward makes weight and bias gradient together
    assert all(p.grad is None for p in module.parameters())


def collect(module, batch):
    found = {}
    stream_of(module).run(batch, lambda fqn, _, gradient, __: found.update({fqn: gradient}))
    return found


@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "checkpointed"])
def test_gradients_are_those_of_backward(reentrant):
    module, x = Deep(reentrant), torch.randn(2, 4)
    found = collect(module, {"x": x})
    module(x).backward()
    assert found.keys() == {fqn for fqn, _ in module.named_parameters()}
    for fqn, parameter in module.named_parameters():
        assert torch.equal(found[fqn], parameter.grad), fqn


def test_a_gradient_is_not_read_before_a_gpu_has_copied_it_to_the_host(monkeypatch):
    waited = []
    queue = SimpleNamespace(synchronize=lambda: waited.append("stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: queue)
    value, gpu = torch.ones(1), torch.device("cuda")
    await_copy(value, torch.device("cpu"))
    await_copy(value.to("meta"), gpu)
    assert not waited
    await_copy(value, gpu)
    assert waited == ["stream"]
    # every gradient, before anything looks at it
    seen: list[str] = []
    monkeypatch.setattr(gradient_stream, "await_copy", lambda gradient, device: seen.append("awaited"))
    is_finite = gradient_stream._is_finite
    monkeypatch.setattr(gradient_stream, "_is_finite", lambda g: seen.append("read") or is_finite(g))
    assert len(collect(Deep(), {"x": torch.ones(2, 4)})) == 21
    assert seen == ["awaited", "read"] * 21


def test_a_gradient_that_comes_in_parts_is_refused():
    module = Deep(reentrant=True)
    with pytest.raises(GTCompileError, match="gradient of shared came in several parts"):
        collect(module, {"x": torch.randn(2, 4, requires_grad=True)})


def test_gradients_not_asked_for_are_dropped():
    module, found = Deep(), []
    stream = GradientStream(module, {module.shared: "shared"})
    stream.run({"x": torch.ones(2, 4)}, lambda fqn, *_: found.append(fqn))
    assert found == ["shared"]
    assert stream.arrived == {"shared"}
    assert all(p.grad is None for p in module.parameters())


def test_a_batch_with_a_gradient_that_is_not_finite_fails_and_says_which_are_not():
    module, found = Deep(), {}
    module.layers[6].register_full_backward_hook(lambda *_: (torch.full((2, 4), torch.inf),))
    with pytest.raises(NotFiniteError, match=r"the gradient of layers\.5") as raised:
        stream_of(module).run(
            {"x": torch.ones(2, 4)}, lambda fqn, p, g, finite: found.setdefault(fqn, bool(finite))
        )
    wrong = {fqn for fqn in found if fqn.startswith(tuple(f"layers.{i}." for i in range(6)))} | {"shared"}
    assert {fqn for fqn, finite in found.items() if not finite} == wrong == raised.value.gradients
    assert not any(p._post_accumulate_grad_hooks for p in module.parameters())


def test_no_gradient_of_a_loss_that_is_not_finite_can_be_used():
    module, found = Deep(), []
    module.register_forward_hook(lambda _module, _inputs, loss: loss + torch.inf)
    with pytest.raises(NotFiniteError, match="the loss is inf") as raised:
        stream_of(module).run(
            {"x": torch.ones(2, 4)}, lambda f, p, g, finite: found.append((f, bool(finite)))
        )
    assert raised.value.gradients == {fqn for fqn, _ in found}
    assert not any(finite for _, finite in found)


def test_tensors_nested_in_a_batch_go_to_the_models_device():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), device="meta"))

        def forward(self, pair, options):
            assert options["name"] == "sum"
            self.devices = {t.device.type for t in (*pair, options["more"][0])}
            raise NotFiniteError("far enough")

    module = Nested()
    batch = {"pair": (torch.ones(1), torch.ones(1)), "options": {"name": "sum", "more": [torch.ones(1)]}}
    with pytest.raises(NotFiniteError, match="far enough"):
        collect(module, batch)
    assert module.devices == {"meta"}
