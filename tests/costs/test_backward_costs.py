"""Costs against brute-force reachability, against counting eager PyTorch, and as a coverage function."""

from operator import getitem

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from gtcompile import CaptureError, backward_costs, compile_blocks, train_only
from gtcompile.costs.backward_costs import costs_of
from gtcompile.graph.flops import count_flops, node_flops, output_flops
from gtcompile.graph.joint_graph import JointGraph
from tests.support.graphs import capture_of
from tests.support.models import (
    BATCH,
    LENGTH,
    POOL,
    WIDTH,
    Recipe,
    Regression,
    Stack,
    make_batch,
    random_sets,
    recipes,
    trained_sets,
)

PRODUCT = 2 * BATCH * LENGTH * WIDTH * WIDTH
"""FLOPs of one linear layer's forward on a batch; each of its two gradients costs as much."""


@st.composite
def pooled_sets(draw):
    """A captured graph, its costs, and a set of its parameters."""
    recipe = draw(st.sampled_from(POOL))
    joint = capture_of(recipe)
    return joint, costs_of(joint), draw(trained_sets(sorted(joint.live)))


def brute_force_flops(joint: JointGraph, trained: frozenset[str]) -> int:
    """FLOPs of what the loss and these gradients need, by walking the graph once for this set."""
    wanted = [
        g for slot, g in zip(joint.slots, joint.gradients, strict=True) if slot in trained and g is not None
    ]
    queue, visited = [*joint.outputs[: joint.forward_outputs], *wanted], set()
    while queue:
        node = queue.pop(0)
        if node is not None and node not in visited:
            visited.add(node)
            queue.extend(node.all_input_nodes)
    return sum(work_of(node) for node in visited if node.op == "call_function")


def work_of(node) -> int:
    """FLOPs of a node; those of a convolution's backward are done for its outputs, each for itself."""
    if node.target is getitem:
        return output_flops(node.args[0]).get(node.args[1], 0)
    return 0 if output_flops(node) else node_flops(node)


@settings(max_examples=150)
@given(pooled_sets())
def test_costs_are_what_reachability_says_set_by_set(case):
    joint, costs, trained = case
    assert costs.step_flops(trained) == brute_force_flops(joint, trained)


@settings(max_examples=12)
@given(recipes(), st.integers(0, 99))
def test_predicted_flops_are_those_counted_in_eager_pytorch(recipe, seed):
    model, batch = recipe.model(), recipe.batch()
    costs = backward_costs(model, batch)
    for trained in [*random_sets(sorted(costs.fqns), 3, seed), costs.fqns]:
        assert costs.step_flops(trained) == eager_flops(model, batch, trained)


def eager_flops(model: nn.Module, batch: dict[str, torch.Tensor], trained: frozenset[str]) -> int:
    """FLOPs of one eager step with `requires_grad` set for exactly these parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    with count_flops() as counter:
        outputs = model(**batch)
        (outputs if isinstance(outputs, torch.Tensor) else outputs.loss).backward()
    return counter.get_total_flops()


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LANGUAGE_MODELS = {
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_predicted_flops_are_those_counted_for_language_models(name):
    model = LANGUAGE_MODELS[name]()
    tokens = torch.randint(3, 50, (2, 7))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    costs = backward_costs(model, batch)
    for trained in [*random_sets(sorted(costs.fqns), 6), costs.fqns]:
        assert costs.step_flops(trained) == eager_flops(model, batch, trained)


def test_predicted_flops_are_those_counted_under_autocast():
    model, batch = Recipe(("attention", "norm")).model(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        costs = backward_costs(model, batch)
        for trained in [*random_sets(sorted(costs.fqns), 4), costs.fqns]:
            assert costs.step_flops(trained) == eager_flops(model, batch, trained)


@settings(max_examples=60)
@given(pooled_sets(), st.data())
def test_training_one_more_never_costs_less_and_saves_shared_work(case, data):
    _, costs, trained = case
    fewer = frozenset(data.draw(st.sets(st.sampled_from(sorted(trained)))))
    fqn = data.draw(st.sampled_from(sorted(costs.fqns)))
    assert costs.step_flops(fewer) <= costs.step_flops(trained)
    assert 0 <= costs.marginal_flops(fqn, trained) <= costs.marginal_flops(fqn, fewer)
    assert costs.marginal_flops(fqn, trained) == costs.step_flops(trained | {fqn}) - costs.step_flops(trained)


@pytest.mark.parametrize("recipe", POOL, ids=str)
def test_training_everything_costs_a_full_step_and_nothing_a_forward(recipe):
    costs = costs_of(capture_of(recipe))
    assert costs.step_flops(costs.fqns) == costs.full_flops
    assert costs.step_flops([]) == costs.forward_flops


@pytest.mark.parametrize("recipe", POOL, ids=str)
def test_the_minimum_budget_is_that_of_the_cheapest_parameter(recipe):
    costs = costs_of(capture_of(recipe))
    cheapest = min(costs.step_flops([fqn]) for fqn in costs.fqns)
    assert costs.cheapest_step_flops == cheapest
    assert costs.forward_flops / costs.full_flops <= costs.minimum_budget_fraction <= 1


@pytest.mark.parametrize("prepare", [lambda model: model, compile_blocks], ids=["eager", "blocks"])
def test_costs_are_the_same_whatever_is_trained_now(prepare):
    model, batch = Recipe(("norm", "partly unused", "norm")).model(), make_batch()
    costs = backward_costs(model, batch)
    prepare(model)
    for trained in (["head.bias"], ["layers.0.*"], None):
        train_only(model, trained)
        flags = [parameter.requires_grad for parameter in model.parameters()]
        assert backward_costs(model, batch) == costs
        assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_a_chain_of_linear_layers_costs_what_a_hand_counts():
    costs = backward_costs(Regression(3), make_batch())
    assert costs.forward_flops == 3 * PRODUCT
    assert costs.full_flops == (3 + 3 + 2) * PRODUCT  # forward, dW, dX; the batch asks for no dX
    assert costs.step_flops(["layers.2.bias"]) == 3 * PRODUCT
    assert costs.step_flops(["layers.2.weight"]) == 4 * PRODUCT
    assert costs.step_flops(["layers.0.bias"]) == 5 * PRODUCT
    assert costs.marginal_flops("layers.1.weight", given=["layers.0.bias"]) == PRODUCT


def test_work_is_listed_by_the_parameters_that_need_it():
    costs = backward_costs(Regression(2), make_batch())
    works = {work.parameters: work.flops for work in costs.shared_work}
    assert works[frozenset({"layers.0.weight"})] == PRODUCT
    assert works[frozenset({"layers.0.weight", "layers.0.bias"})] == PRODUCT  # dX of the second layer
    assert all(work.flops > 0 and work.parameters for work in costs.shared_work)


def test_branches_that_a_parameter_does_not_feed_cost_it_nothing():
    model = Recipe(("branches",)).model()
    costs = backward_costs(model, make_batch())
    left, right = "layers.0.left.weight", "layers.0.right.down.weight"
    together = costs.step_flops([left, right])
    shared = costs.step_flops([left]) + costs.step_flops([right]) - together
    assert shared == costs.forward_flops + PRODUCT  # both need the head's dX, and neither the other's product


def test_tied_weights_are_one_parameter_costed_with_both_uses():
    tied, untied = (
        backward_costs(Recipe(("norm",), tied=tied).model(), make_batch()) for tied in (True, False)
    )
    assert tied.fqns == untied.fqns - {"head.weight"}
    alone, both = tied.step_flops(["embed.weight"]), untied.step_flops(["embed.weight", "head.weight"])
    assert alone == both
    assert tied.step_flops(["head.weight"]) == alone == tied.step_flops(["embed.weight", "head.weight"])


def test_a_module_used_twice_is_costed_with_both_uses():
    model = Recipe(("no dropout",), shared=True).model()
    costs = backward_costs(model, make_batch())
    weight = "layers.0.linear.weight"
    assert costs.step_flops([weight]) == eager_flops(model, make_batch(), frozenset({weight}))
    assert costs.step_flops(["layers.1.linear.weight"]) == costs.step_flops([weight])


def test_unused_and_user_frozen_parameters_are_listed_and_not_selectable():
    costs = backward_costs(Recipe(("partly unused",)).model(), make_batch())
    status = {p.fqn: p.status for p in costs.parameters}
    assert status["layers.0.never_called.weight"] == "unused"
    assert status["layers.0.scale"] == "frozen by user"
    assert status["layers.0.linear.weight"] == "selectable"
    assert costs.fqns == {fqn for fqn, s in status.items() if s == "selectable"}
    for fqn in ("layers.0.never_called.weight", "layers.0.scale", "nonsense"):
        with pytest.raises(ValueError, match=f"no selectable parameter is called '{fqn}'"):
            costs.step_flops([fqn])


def test_a_single_string_is_refused_as_a_set():
    costs = backward_costs(Regression(1), make_batch())
    with pytest.raises(TypeError, match=r"got the string 'layers.0.bias'"):
        costs.step_flops("layers.0.bias")


def test_costs_of_a_larger_batch_grow_with_it():
    model = Stack([nn.Linear(WIDTH, WIDTH)], tied=False)
    small, large = (backward_costs(model, make_batch(0, rows, LENGTH, WIDTH)) for rows in (2, 6))
    assert large.full_flops == 3 * small.full_flops


def test_a_loss_that_depends_on_no_parameter_is_an_error():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            return x.square().mean().requires_grad_()

    with pytest.raises(CaptureError):
        backward_costs(Constant(), {"x": torch.randn(2, 2)})


def test_costs_print_as_one_line():
    costs = backward_costs(Regression(2), make_batch())
    assert (
        str(costs)
        == f"{costs.full_flops:.4g} FLOPs a full step, 40.0% of them forward, 4 selectable parameters"
    )


def test_costs_are_short_to_look_at():
    costs = backward_costs(Regression(2), make_batch())
    assert repr(costs) == f"<BackwardCosts: {costs}>"
