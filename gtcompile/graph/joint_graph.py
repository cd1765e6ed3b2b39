"""A joint forward/backward graph, with the meaning of its inputs and outputs."""

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
"""`JointGraph.source` of a graph that is valid only for batches that take the same branches."""
FORCED_GRADIENTS = "activations on which the model calls requires_grad_()"
"""Name of the one gradient slot that these activations share. It is live for every trained set."""
ParameterStatus = Literal["selectable", "frozen by user", "unused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One `nn.Parameter` of a model: the unit of selection."""

    fqn: str
    """Fully qualified name, the first that `named_parameters` reports."""
    aliases: tuple[str, ...] = ()
    """The other names of the same tensor, if weights are tied."""
    shape: tuple[int, ...]
    """Unsharded shape."""
    dtype: torch.dtype
    """Dtype of the stored values."""
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
    """Map each name of each parameter, aliases of tied weights included, to its FQN."""
    return {name: p.fqn for p in parameters for name in (p.fqn, *p.aliases)}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class JointGraph:
    """AOTAutograd's forward + backward graph.

    Inputs: primals, then tangents. Outputs: the forward outputs, then one gradient slot per primal. A joint
    graph is never changed in place: a pass returns a new one. Refer to nodes of another graph by name only.
    """

    module: fx.GraphModule
    """The graph. Every operator has `meta["val"]`: a fake tensor, a number, or a tuple of these."""
    forward_outputs: int
    """Number of leading outputs that belong to the forward; the gradient slots follow."""
    slots: tuple[str | None, ...]
    """For each gradient slot, the name of the input whose gradient it is; None for inputs without gradient.
    One may be `FORCED_GRADIENTS`, which is not an input of the model."""
    parameters: tuple[Parameter, ...] = ()
    """Every parameter of the model, in registration order; empty if the graph is a region of a model."""
    source: str = ""
    """How the graph was captured, for logs and reports."""
    provenance: tuple[str, ...] = ()
    """Names of the passes that were applied, in order."""

    @property
    def follows_values(self) -> bool:
        """Whether branches and sizes in this graph depend on the values of the captured batch."""
        return self.source == ONE_BATCH

    @property
    def graph(self) -> fx.Graph:
        """The FX graph, which passes read and edit."""
        return self.module.graph

    @property
    def outputs(self) -> tuple[fx.Node | None, ...]:
        """All outputs, forward first."""
        return tuple(self.module.graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def gradients(self) -> tuple[fx.Node | None, ...]:
        """The gradient slots: a node each, or None if this gradient is not computed."""
        return self.outputs[self.forward_outputs :]

    @property
    def live(self) -> frozenset[str]:
        """Names of the inputs whose gradient this graph computes."""
        pairs = zip(self.slots, self.gradients, strict=True)
        named = (name for name, gradient in pairs if name is not None and gradient is not None)
        return frozenset(named) - {FORCED_GRADIENTS}

    def forward_nodes(self) -> frozenset[fx.Node]:
        """Return the nodes that a forward output depends on. They run for every trained set."""
        return ancestors(node for node in self.outputs[: self.forward_outputs] if node is not None)

    def copy(self) -> "JointGraph":
        """Return a copy. Nodes and metadata dictionaries are copied, fake tensors shared."""
        return dataclasses.replace(self, module=copy_module(self.module))

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        size = f"{len(self.module.graph.nodes)} nodes, {len(self.live)} gradients"
        return f"joint graph ({self.source}): {size}" if self.source else f"joint graph: {size}"


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph module. Nodes and metadata dictionaries are copied, fake tensors shared."""
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
        descriptors: AOTAutograd's descriptors of the outputs, from `meta["desc"]` of the output node.
    """
    forward = takewhile(lambda desc: desc is not None and not isinstance(desc, GradAOTOutput), descriptors)
    return sum(1 for _ in forward)


def ancestors(nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """Return the given nodes and everything they are computed from. The graph must be functional."""
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return frozenset(seen)


def verify(joint: JointGraph) -> None:
    """Check the invariants of a joint graph.

    Raises:
        GraphContractError: an invariant is violated; the message names the first.
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
    """Whether a call returns a value; operators that only check their arguments do not."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.returns)
