"""Values that the forward saves for the backward, in bytes, for any set of trained parameters.

Eager code saves what the backward of the joint graph reads. Compiled blocks save less: torch's partitioner
computes some values again where that is cheaper than reading them. So the partitioner is asked here too.
"""

import dataclasses
from collections.abc import Collection

import torch
from torch import fx, nn

from gtcompile.capture.model_io import runs_as_one_region, unwrap
from gtcompile.capture.pristine_model import compiled_blocks
from gtcompile.compiler.partitioning import SavedMemory, keep_products_in_backward, partition
from gtcompile.costs.dependency_graph import nodes_of, parameters_needing
from gtcompile.costs.prices import SharedAmount
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.graph.module_paths import module_paths

_Saved = dict[int, tuple[int, frozenset[str]]]
"""By the identity of a storage: its bytes, and the parameters whose gradients read it."""
EVERYTHING = ("",)
"""Path of the compiled part of a model that is compiled as a whole."""


def compiled_parts(model: nn.Module) -> tuple[str, ...]:
    """Return the FQNs of the compiled blocks; `EVERYTHING` for a model that is compiled as a whole."""
    if runs_as_one_region(model):
        return EVERYTHING
    blocks = set(compiled_blocks(model))
    return tuple(name for name, module in unwrap(model).named_modules() if module in blocks)


def saved_values(
    joint: JointGraph, compiled: Collection[str] = (), memory_budget: float = 1.0
) -> tuple[SharedAmount, ...]:
    """Return the bytes saved for the backward, with the parameters whose gradients read them.

    Weights, buffers and the batch exist anyway and are left out. A storage counts once.

    Args:
        joint: as captured, with every gradient live.
        compiled: paths of the modules that are compiled.
        memory_budget: the `activation_memory_budget` that they are compiled with.
    """
    inside = _inside(joint, compiled)
    saved = _read_by_backward(joint, inside)
    if compiled:
        for key, (size, parameters) in _saved_by_partitioner(joint, inside, memory_budget).items():
            before = saved.get(key, (size, frozenset()))[1]
            saved[key] = size, before | parameters
    return tuple(SharedAmount(size, parameters) for size, parameters in saved.values())


def _inside(joint: JointGraph, compiled: Collection[str]) -> frozenset[str]:
    """Names of the nodes that belong to compiled modules."""
    prefixes = tuple(f"{path}." if path else "" for path in compiled)
    paths = module_paths(joint)
    return frozenset(
        node.name for node, path in paths.items() if prefixes and f"{path}.".startswith(prefixes)
    )


def _read_by_backward(joint: JointGraph, left_out: frozenset[str]) -> _Saved:
    """The forward values that backward nodes read, but for those of some nodes."""
    nodes, forward = nodes_of(joint), joint.forward_nodes()
    needed, given = parameters_needing(joint, nodes), _given(joint)
    saved: _Saved = {}
    for node in nodes:
        if node in forward or node.op == "placeholder":
            continue
        for source in node.all_input_nodes:
            if source in forward and source.op != "placeholder" and source.name not in left_out:
                _add(saved, source, needed[node], given)
    return saved


def _saved_by_partitioner(joint: JointGraph, inside: frozenset[str], memory_budget: float) -> _Saved:
    """The values that a partition of the joint graph saves in some nodes."""
    given, whole = _given(joint), joint.copy()
    keep_products_in_backward(whole)
    memory = SavedMemory(budget=memory_budget, parameters=())
    _, module = partition(whole.module, (), memory, num_fwd_outputs=joint.forward_outputs)
    backward = dataclasses.replace(joint, module=module, forward_outputs=0)
    nodes = nodes_of(backward)
    needed = parameters_needing(backward, nodes)
    saved: _Saved = {}
    for node in nodes:
        if node.op == "placeholder" and node.name in inside:
            _add(saved, node, needed[node], given)
    return saved


def _add(saved: _Saved, node: fx.Node, parameters: frozenset[str], given: Collection[int]) -> None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not parameters:
        return
    storage = value.untyped_storage()
    if (key := storage._cdata) not in given:
        saved[key] = storage.nbytes(), saved.get(key, (0, frozenset[str]()))[1] | parameters


def _given(joint: JointGraph) -> frozenset[int]:
    """Identities of the storages of the graph's inputs."""
    values = (node.meta.get("val") for node in joint.graph.find_nodes(op="placeholder"))
    return frozenset(v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor))
