"""A joint forward/backward graph and what its inputs and outputs mean."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch
from torch import fx

from gtcompile.errors import GraphContractError
from gtcompile.torch_internals import GradAOTOutput

ONE_BATCH = "values of one batch"
"""The source of a graph that is valid only for batches on which the model takes the same branches."""
FORCED_GRADIENTS = "activations on which the model calls requires_grad_()"
"""The gradient slot of these activations together: live whatever is trained."""
ParameterStatus = Literal["selectable", "frozen by user", "unused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One `nn.Parameter` of a model: the unit of selection."""

    fqn: str
    """Fully qualified name, the first that `named_parameters` reports."""
    aliases: tuple[str, ...] = ()
    """The other names of the same tensor, when weights are tied."""
    shape: tuple[int, ...]
    """Unsharded shape."""
    dtype: torch.dtype
    """Type of the stored values."""
    status: ParameterStatus = "selectable"
    """`selectable`: receives a gradient; `unused`: the loss does not depend on it; `frozen by user`: its
    `requires_grad` is False."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def __str__(self) -> str:
        tied = f" = {' = '.join(self.aliases)}" if self.aliases else ""
        return f"{self.fqn}{tied} {list(self.shape)}"


def names_of(parameters: Iterable[Parameter]) -> dict[str, str]:
    """From every name of some parameters, aliases of tied weights included, to the FQN."""
    return {name: p.fqn for p in parameters for name in (p.fqn, *p.aliases)}


@dataclass(frozen=True, slots=True, kw_only=True)
class JointGraph:
    """AOTAutograd's forward + backward graph.

    Inputs: primals, then tangents. Outputs: those of the forward, then one gradient slot per primal. Never
    changed in place: a pass returns another one. Names refer across graphs, nodes only within one.
    """

    module: fx.GraphModule
    """The graph; every operator carries `meta["val"]`, a fake tensor, a number or a tuple of them."""
    forward_outputs: int
    """How many leading outputs belong to the forward; the gradient slots follow."""
    slots: tuple[str | None, ...]
    """Per gradient slot the name of the input it is the gradient of; None for an input that never has one.
    One may be `FORCED_GRADIENTS`, which is no input of the model."""
    parameters: tuple[Parameter, ...] = ()
    """Every parameter of the model, in registration order; empty for a region of one."""
    source: str = ""
    """How the graph was captured, for logs and reports."""
    provenance: tuple[str, ...] = ()
    """The passes that made it, in order."""

    @property
    def follows_values(self) -> bool:
        """Whether branches and sizes are those that the values of one batch led to."""
        return self.source == ONE_BATCH

    @property
    def graph(self) -> fx.Graph:
        """The nodes, as passes read and edit them."""
        return self.module.graph

    @property
    def outputs(self) -> tuple[fx.Node | None, ...]:
        """All outputs, forward first."""
        return tuple(self.module.graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def gradients(self) -> tuple[fx.Node | None, ...]:
        """The gradient slots: a node, or None where no gradient is computed."""
        return self.outputs[self.forward_outputs :]

    @property
    def live(self) -> frozenset[str]:
        """Names of the inputs whose gradient this graph computes."""
        pairs = zip(self.slots, self.gradients, strict=True)
        named = (name for name, gradient in pairs if name is not None and gradient is not None)
        return frozenset(named) - {FORCED_GRADIENTS}

    def forward_nodes(self) -> frozenset[fx.Node]:
        """Nodes some forward output needs: they run whatever is trained."""
        return ancestors(node for node in self.outputs[: self.forward_outputs] if node is not None)

    def copy(self) -> "JointGraph":
        """The same graph on nodes of its own; metadata dictionaries are copied, fake tensors shared."""
        return dataclasses.replace(self, module=copy_module(self.module))

    def __str__(self) -> str:
        size = f"{len(self.module.graph.nodes)} nodes, {len(self.live)} gradients"
        return f"joint graph ({self.source}): {size}" if self.source else f"joint graph: {size}"


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph on nodes of its own; metadata dictionaries are copied, fake tensors shared."""
    graph = fx.Graph(tracer_cls=module.graph._tracer_cls)
    twin: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        twin[node] = graph.node_copy(node, twin.__getitem__)
    copied = fx.GraphModule(module, graph)
    copied.meta = dict(module.meta)
    return copied


def count_forward_outputs(descriptors: Sequence[object]) -> int:
    """Count the leading outputs that belong to the forward; the outputs after them are gradient slots.

    Args:
        descriptors: AOTAutograd's, one per output of a joint graph, as in `meta["desc"]` of its output node.
    """
    forward = takewhile(lambda desc: desc is not None and not isinstance(desc, GradAOTOutput), descriptors)
    return sum(1 for _ in forward)


def ancestors(nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """The given nodes, of one functional graph, and everything they are computed from."""
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return frozenset(seen)


def verify(joint: JointGraph) -> None:
    """Check what every joint graph promises.

    Raises:
        GraphContractError: naming the first broken promise.
    """
    outputs = joint.outputs
    if len(outputs) != joint.forward_outputs + len(joint.slots):
        counts = f"{joint.forward_outputs} forward outputs and {len(joint.slots)} gradient slots"
        raise GraphContractError(f"expected {counts}, the graph has {len(outputs)} outputs")
    for slot, gradient in zip(joint.slots, joint.gradients, strict=True):
        if slot is None and gradient is not None:
            raise GraphContractError(f"output {gradient.name} is a gradient of no known input")
    for node in joint.module.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and returns_something(node):
            raise GraphContractError(f"node {node.name} ({node.target}) has no meta['val']")


def returns_something(node: fx.Node) -> bool:
    """Whether a call has a value; one that only checks its arguments has none."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.returns)
