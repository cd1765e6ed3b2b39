"""Checks in a backward: those of dropped gradients go, all others stay."""

from operator import getitem

import pytest
import torch
from torch import fx

from gtcompile.graph.joint_graph import JointGraph
from gtcompile.passes.effect_tokens import EFFECTS, drop_effect_tokens, drop_unneeded_checks
from gtcompile.passes.pipeline import restrict_gradients
from gtcompile.torch_internals import BackwardTokenAOTOutput, FakeTensorMode, ShapeEnv, with_effects
from tests.support.graphs import operators, run_graph

aten = torch.ops.aten
SOLVE, CHECK = aten._linalg_solve_ex.default, aten._linalg_check_errors.default
SINGULAR, REGULAR = torch.zeros(2, 2), torch.eye(2)


def checked_solve() -> JointGraph:
    """Computes `sin(a)`; its gradients are the solution of a system, which is checked, and `cos(a)`."""
    graph = fx.Graph()
    token, a = graph.placeholder("token"), graph.placeholder("a")
    token.meta["val"], a.meta["val"] = torch.empty(0), torch.eye(2)

    def call(target, *args, **kwargs):
        node = graph.call_function(target, args, kwargs)
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        return node

    sine, cosine, solved = call(aten.sin.default, a), call(aten.cos.default, a), call(SOLVE, a, a)
    solution, info = call(getitem, solved, 0), call(getitem, solved, 3)
    check = call(with_effects, token, CHECK, info, "solve", is_matrix=True)
    output = graph.output((sine, solution, cosine, call(getitem, check, 0)))
    output.meta["desc"] = [None, None, None, BackwardTokenAOTOutput(idx=0)]
    module = fx.GraphModule({}, graph)
    return JointGraph(module=module, forward_outputs=1, slots=("solution", "cosine", EFFECTS))


def run(joint: JointGraph, matrix: torch.Tensor) -> list[torch.Tensor | None]:
    return run_graph(joint.module, [torch.empty(0), matrix])


def restricted(keep: set[str]) -> JointGraph:
    return restrict_gradients(drop_unneeded_checks(checked_solve(), keep), keep | {EFFECTS})


def test_the_check_of_a_dropped_gradient_goes_with_what_it_checked():
    joint = restricted({"cosine"})
    assert SOLVE not in operators(joint.module)
    sine, solution, cosine, token = run(joint, SINGULAR)
    assert solution is None
    assert token is not None
    assert torch.equal(sine, SINGULAR.sin())
    assert torch.equal(cosine, SINGULAR.cos())


@pytest.mark.parametrize("keep", [{"solution"}, {"solution", "cosine"}])
def test_the_check_of_a_kept_gradient_stays(keep):
    joint = restricted(keep)
    assert torch.equal(run(joint, REGULAR)[1], REGULAR)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        run(joint, SINGULAR)


def test_the_check_of_a_value_with_a_symbolic_shape_stays():
    joint = checked_solve()
    (check,) = joint.graph.find_nodes(op="call_function", target=with_effects)
    check.args[2].meta["val"] = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.zeros(3))
    unchecked = drop_unneeded_checks(joint, {"cosine"})
    assert torch.equal(run(unchecked, REGULAR)[2], REGULAR.cos())


def test_without_tokens_nothing_is_checked():
    joint = checked_solve()
    module = drop_effect_tokens(joint.module)
    assert with_effects not in operators(module)
    assert run_graph(module, [torch.empty(0), SINGULAR])[3] is None
