"""Losses computed outside of the model, on any batch: gradients and FLOPs are those of eager PyTorch."""

import dataclasses
from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from gtcompile import CaptureError, compile_blocks
from gtcompile.capture.batch_tree import split_batch
from gtcompile.capture.capture import capture
from gtcompile.costs.backward_costs import costs_of
from gtcompile.graph.flops import count_flops
from gtcompile.graph.joint_graph import ONE_BATCH
from gtcompile.passes.pipeline import restrict_gradients
from gtcompile.testing import assert_same_gradients
from tests.support.graphs import run_joint
from tests.support.models import ResidualMLP, random_sets

ROWS, WIDTH = 5, 6


class Classifier(nn.Module):
    """Returns logits, and the hidden values if it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
        self.head = nn.Linear(WIDTH, 3)
        self.unused_by_the_loss = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, with_hidden=False):
        hidden = torch.tanh(self.layers(x))
        logits = self.head(hidden)
        return (logits, self.unused_by_the_loss(hidden)) if with_hidden else logits


@dataclasses.dataclass
class Fields:
    inputs: torch.Tensor
    labels: torch.Tensor
    note: str = "not a tensor"


@dataclasses.dataclass(frozen=True)
class Frozen:
    inputs: torch.Tensor
    labels: torch.Tensor
    rows: int = dataclasses.field(default=ROWS, init=False)


class Named(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor


class Plain:
    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.inputs, self.labels = inputs, labels


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randint(0, 3, (ROWS,), generator=generator)


def from_pair(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def from_attributes(model, batch):
    return nn.functional.cross_entropy(model(batch.inputs), batch.labels)


def from_keys(model, batch):
    return nn.functional.cross_entropy(model(batch["in"][0]), batch["labels"])


STRUCTURES = {
    "tuple": (tuple, from_pair),
    "list": (list, from_pair),
    "named tuple": (lambda pair: Named(*pair), from_pair),
    "dataclass": (lambda pair: Fields(*pair), from_attributes),
    "frozen dataclass": (lambda pair: Frozen(*pair), from_attributes),
    "object": (lambda pair: Plain(*pair), from_attributes),
    "nested dictionary": (lambda pair: {"in": [pair[0], None], "labels": pair[1]}, from_keys),
    "other mapping": (lambda pair: UserDict({"in": (pair[0],), "labels": pair[1]}), from_keys),
    "tensor": (lambda pair: pair[0], lambda model, x: model(x).square().mean()),
}


def eager_step(model, batch, loss_fn, trained):
    """FLOPs and gradients of a step that trains some parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    with count_flops() as counter:
        loss_fn(model, batch).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.requires_grad_(True)
    return counter.get_total_flops(), gradients


def check_against_eager(model, batch, loss_fn):
    joint = capture(model, batch, loss_fn=loss_fn)
    costs = costs_of(joint)
    named, _ = split_batch(batch)
    for trained in (*random_sets(sorted(joint.live), 2), joint.live):
        flops, expected = eager_step(model, batch, loss_fn, trained)
        assert costs.step_flops(trained) == flops
        loss, gradients = run_joint(restrict_gradients(joint, trained), model, named)
        assert loss[0] == loss_fn(model, batch)
        assert_same_gradients(gradients, expected)
    return joint


@pytest.mark.parametrize("kind", STRUCTURES)
def test_gradients_and_flops_are_those_of_eager_pytorch(kind):
    make, loss_fn = STRUCTURES[kind]
    check_against_eager(Classifier(), make(tensors()), loss_fn)


@pytest.mark.parametrize("kind", ["tuple", "dataclass", "nested dictionary", "tensor"])
def test_ordinary_structures_are_captured_by_dynamo(kind):
    make, loss_fn = STRUCTURES[kind]
    assert capture(Classifier(), make(tensors()), loss_fn=loss_fn).source == "dynamo"


def test_a_keyword_dictionary_of_the_forward_may_be_one_too():
    x, labels = tensors()
    batch = {"x": x, "labels": labels, "weight": torch.tensor([1.0, 2.0, 3.0])}

    def weighted(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], batch["weight"])

    check_against_eager(Classifier(), batch, weighted)


def test_what_the_model_returns_besides_costs_its_flops():
    def loss_fn(model, batch):
        return model(batch[0], with_hidden=True)[0].square().mean()

    joint = capture(Classifier(), tensors(), loss_fn=loss_fn)
    costs = costs_of(joint)
    flops, _ = eager_step(Classifier(), tensors(), loss_fn, joint.live)
    assert costs.full_flops == flops
    assert "unused_by_the_loss.weight" not in joint.live


def test_a_model_may_be_called_several_times():
    def contrast(model, batch):
        first, second = model(batch[0]), model(-batch[0])
        return (first * second.detach()).mean() + second.square().mean()

    model, batch = Classifier(), tensors()
    joint = capture(model, batch, loss_fn=contrast)
    flops, expected = eager_step(model, batch, contrast, joint.live)
    assert costs_of(joint).full_flops == flops
    _, gradients = run_joint(joint, model, split_batch(batch)[0])
    assert_same_gradients(gradients, expected, rtol=1e-5, atol=1e-7)


def test_a_loss_that_branches_on_data_is_captured_for_its_batch():
    def loss_fn(model, batch):
        logits = model(batch[0])
        return (logits @ logits.t()).mean() if batch[1].sum() >= 0 else logits.mean()

    assert check_against_eager(Classifier(), tensors(), loss_fn).source == ONE_BATCH


def test_a_model_on_the_meta_device_needs_no_weights():
    real = costs_of(capture(Classifier(), tensors(), loss_fn=from_pair))
    meta = Classifier().to("meta")
    assert costs_of(capture(meta, tensors(), loss_fn=from_pair)) == real
    on_meta = tuple(tensor.to("meta") for tensor in tensors())
    assert costs_of(capture(meta, on_meta, loss_fn=from_pair)) == real


def test_compiled_models_are_captured_as_their_authors_wrote_them():
    model = nn.Sequential(ResidualMLP(), ResidualMLP())
    x = torch.randn(2, 8)
    plain = costs_of(capture(model, x, loss_fn=lambda model, x: model(x).square().mean()))
    for run in (torch.compile(model, backend="eager"), compile_blocks(model, compiler="eager")):
        assert costs_of(capture(run, x, loss_fn=lambda model, x: model(x).square().mean())) == plain


def test_a_cache_for_generation_is_left_out():
    class Caching(Classifier):
        def forward(self, x, use_cache=True):
            if use_cache:
                torch._dynamo.graph_break()
            return super().forward(x)

    assert capture(Caching(), tensors(), loss_fn=from_pair).source == "dynamo"


@pytest.mark.parametrize(
    ("loss_fn", "got"),
    [
        (lambda model, batch: model(batch[0]), r"a tensor of shape \[5, 3\]"),
        (lambda model, batch: None, "NoneType"),
        (lambda model, batch: {"loss": model(batch[0]).mean()}, "dict"),
    ],
)
def test_a_loss_function_that_returns_no_scalar_is_refused(loss_fn, got):
    with pytest.raises(CaptureError, match=f"expected loss_fn to return a scalar tensor, got {got}"):
        capture(Classifier(), tensors(), loss_fn=loss_fn)


def test_a_rebuilt_batch_has_the_types_and_the_constants_of_the_first():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    batch = {"a": [1, (torch.zeros(1), "b")], "n": Named(*tensors()), "f": Fields(*tensors()), "p": packed}
    named, rebuild = split_batch(batch)
    twin = rebuild({name: tensor + 1 for name, tensor in named.items()})
    assert twin["a"][0] == 1
    assert twin["a"][1][1] == "b"
    assert twin["a"][1][0] == 1
    assert type(twin["n"]) is Named
    assert twin["f"].note == "not a tensor"
    assert torch.equal(twin["p"].data, packed.data + 1)
    assert torch.equal(batch["a"][1][0], torch.zeros(1))


def test_a_tensor_in_two_places_is_one_tensor():
    x = torch.ones(2)
    named, rebuild = split_batch({"x": x, "again": [x]})
    assert len(named) == 1
    twin = rebuild(named)
    assert twin["x"] is twin["again"][0]
