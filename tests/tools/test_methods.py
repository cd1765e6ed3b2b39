"""The last blocks that fit a budget, on costs made by hand."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from gtcompile import BackwardCosts, BudgetError
from gtcompile.costs.backward_costs import SharedWork
from gtcompile.graph.joint_graph import Parameter
from gtcompile.tools.finetune.methods import last_blocks


class Stack(nn.Module):
    """Blocks of two parameters between an embedding and a head."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(2, 2, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))
        self.head = nn.Linear(2, 2, bias=False)


def chain_costs(model: nn.Module) -> BackwardCosts:
    """A chain: each parameter has a gradient of 10 FLOPs, and each block passes its own on for 10 more."""
    fqns = [name for name, _ in model.named_parameters()]
    work = [SharedWork(10, frozenset({fqn})) for fqn in fqns]
    work += [SharedWork(10, frozenset(fqns[:end])) for end in range(1, len(fqns))]
    parameters = tuple(Parameter(fqn=fqn, shape=(1,), dtype=torch.float32) for fqn in fqns)
    return BackwardCosts(parameters=parameters, forward_flops=100, shared_work=tuple(work))


def test_the_last_blocks_are_taken_whole_from_the_end() -> None:
    model = Stack(4)
    costs = chain_costs(model)
    budget = costs.step_flops({"blocks.2.weight", "blocks.2.bias", "blocks.3.weight", "blocks.3.bias"})
    chosen = last_blocks(model, costs, budget / costs.full_flops)
    assert chosen == {"blocks.2.weight", "blocks.2.bias", "blocks.3.weight", "blocks.3.bias"}


def test_only_outermost_lists_are_blocks() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(Stack(2) for _ in range(2))
    chosen = last_blocks(model, chain_costs(model), 0.8)
    assert {fqn.split(".")[1] for fqn in chosen} == {"1"}
    assert {"layers.1.embedding.weight", "layers.1.blocks.0.bias"} <= chosen


def test_a_model_without_lists_is_cut_into_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    assert last_blocks(model, chain_costs(model), 0.9) == {"1.weight"}


def test_a_budget_too_small_for_one_block_names_the_smallest() -> None:
    model = Stack(4)
    costs = chain_costs(model)
    with pytest.raises(BudgetError, match="smallest that works is") as caught:
        last_blocks(model, costs, 0.4)
    assert last_blocks(model, costs, caught.value.minimum_budget_fraction) == {
        "blocks.3.weight",
        "blocks.3.bias",
    }


@given(st.integers(1, 8), st.floats(0.05, 1.0))
def test_the_budget_is_kept_and_one_block_more_would_break_it(depth: int, budget: float) -> None:
    model = Stack(depth)
    costs = chain_costs(model)
    last = {f"blocks.{depth - 1}.weight", f"blocks.{depth - 1}.bias"}
    assume(costs.step_flops(last) <= budget * costs.full_flops)
    chosen = last_blocks(model, costs, budget)
    assert costs.step_flops(chosen) <= budget * costs.full_flops
    missing = depth - len(chosen) // 2
    if missing:
        more = chosen | {f"blocks.{missing - 1}.weight", f"blocks.{missing - 1}.bias"}
        assert costs.step_flops(more) > budget * costs.full_flops
