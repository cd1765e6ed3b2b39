"""FLOPs of the forward inside of modules, which a step saves when it leaves these modules out."""

from collections.abc import Sequence

from gtcompile.costs.dependency_graph import nodes_of, work_by_node
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.graph.module_paths import module_paths


def forward_flops_inside(joint: JointGraph, modules: Sequence[str]) -> tuple[int, ...]:
    """Return the FLOPs per training step of the forward inside each of these modules.

    Args:
        joint: as captured, with every gradient live.
        modules: FQNs, none inside of another.

    Raises:
        CaptureError: lists every matmul-like operator without a FLOP formula.
    """
    paths, forward = module_paths(joint), joint.forward_nodes()
    inside = dict.fromkeys(modules, 0)
    for node, flops in work_by_node(nodes_of(joint)).items():
        if node in forward and (module := _containing(paths[node], inside)) is not None:
            inside[module] += flops
    return tuple(inside.values())


def _containing(path: str, modules: dict[str, int]) -> str | None:
    """Return the module that a path leads into; None if it leads into none of them."""
    parts = path.split(".")
    starts = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return next((start for start in starts if start in modules), None)
