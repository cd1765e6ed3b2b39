"""differentiate_loss_only: logits nobody differentiates get no tangent."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from gtcompile.passes.loss_only import differentiate_loss_only
from gtcompile.testing import assert_same_gradients, reference_gradients

VOCABULARY = 7


class Classifier(nn.Module):
    """Returns its loss and its logits, or the logits alone."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, VOCABULARY)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(torch.relu(self.hidden(x)))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (3,), generator=generator)
    return {"x": torch.randn(3, 4, generator=generator), "labels": labels}


def captured(inputs: dict[str, torch.Tensor]) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: Sequence[Any]) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(Classifier(), backend=keep)(**inputs)
    return graphs[0]


def detached(graph: fx.GraphModule) -> int:
    return len(graph.graph.find_nodes(op="call_method", target="detach"))


def test_logits_beside_a_loss_are_detached():
    graph = captured(batch())
    assert (detached(graph), detached(differentiate_loss_only(graph))) == (0, 1)


def test_a_graph_without_a_scalar_output_keeps_its_tangents():
    assert detached(differentiate_loss_only(captured({"x": batch()["x"]}))) == 0


def test_doing_it_twice_changes_nothing_more():
    once = differentiate_loss_only(captured(batch()))
    assert detached(differentiate_loss_only(once)) == detached(once)


def test_the_gradients_of_the_loss_are_the_same_and_logits_need_none():
    torch.manual_seed(0)
    model = Classifier()
    options = {"compiler": "eager", "differentiate": "loss"}
    compiled = torch.compile(model, backend="gtcompile", options=options)
    output = compiled(**batch())
    output["loss"].backward()
    assert not output["logits"].requires_grad
    assert_same_gradients(model, reference_gradients(model, batch()))
