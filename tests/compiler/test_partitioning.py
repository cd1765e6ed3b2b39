"""A budget of memory: less is saved for backward, gradients stay as they are, recomputation is counted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtcompile.compiler.blocks import compile_blocks
from gtcompile.compiler.partitioning import HoistingPartitioner, SavedMemory
from gtcompile.compiler.specialized import TrainedSetPartitioner
from gtcompile.costs.backward_costs import backward_costs
from gtcompile.state.trained_set import train_only
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.compiler.test_hoisted import bytes_saved
from tests.support.models import Recipe, counted_step, forget_captures, random_sets, selectable, step

BUDGETS = (1.0, 0.4, 0.0)
RECIPE = Recipe(("attention", "dropout", "convolution"))
SOME = random_sets(selectable(RECIPE.model()), 1)[0]


def compiled(model, budget, **options):
    options |= {"compiler": "eager", "activation_memory_budget": budget}
    return torch.compile(model, backend="gtcompile", options=options)


def saved_and_recomputed(variants: str, budget: float, trained) -> tuple[int, int]:
    """Bytes saved, and FLOPs counted beyond those predicted, of a step whose gradients are checked."""
    forget_captures()
    model, batch = RECIPE.model(), RECIPE.batch()
    run = compiled(model, budget, variants=variants)
    predicted = backward_costs(model, batch).step_flops(train_only(run, trained))
    torch.manual_seed(0)
    expected = reference_gradients(run, batch)
    step(run, batch)
    assert_same_gradients(run, expected)
    counted = counted_step(run, batch)
    return bytes_saved(run, batch), counted - predicted


@pytest.mark.parametrize("variants", ["hoisted", "specialized"])
@pytest.mark.parametrize("trained", [None, SOME], ids=["everything", "some"])
def test_a_smaller_budget_saves_less_and_recomputes_more(variants, trained):
    saved, recomputed = zip(*(saved_and_recomputed(variants, b, trained) for b in BUDGETS), strict=True)
    assert list(saved) == sorted(saved, reverse=True)
    assert saved[-1] < saved[0]
    assert recomputed[0] == 0
    assert min(recomputed) == 0
    assert recomputed[-1] > 0


@given(
    layers=st.lists(
        st.sampled_from(("attention", "dropout", "convolution", "branches")), min_size=1, max_size=2
    ),
    budget=st.floats(0, 1),
    variants=st.sampled_from(("hoisted", "specialized")),
    seed=st.integers(0, 9),
)
@settings(max_examples=4)
def test_gradients_are_those_of_eager_freezing_at_any_budget(layers, budget, variants, seed):
    forget_captures()
    recipe = Recipe(tuple(layers), seed=seed)
    model, batch = recipe.model(), recipe.batch()
    run = compiled(model, budget, variants=variants)
    for trained in random_sets(selectable(model), 2, seed):
        train_only(run, trained)
        expected = reference_gradients(run, batch)
        step(run, batch)
        assert_same_gradients(run, expected)


def test_blocks_of_generated_code_keep_to_a_budget():
    recipe = Recipe(("attention",) * 2)
    saved = []
    for budget in (1.0, 0.2):
        forget_captures()
        model, batch = recipe.model(), recipe.batch()
        compile_blocks(model, activation_memory_budget=budget)
        for trained in (None, *random_sets(selectable(model), 1)):
            train_only(model, trained)
            expected = reference_gradients(model, batch)
            step(model, batch)
            assert_same_gradients(model, expected, rtol=1e-4, atol=1e-5)
        train_only(model, None)
        saved.append(bytes_saved(model, batch))
    assert saved[1] < 0.6 * saved[0]


@pytest.mark.parametrize(
    "make", [HoistingPartitioner, lambda memory: TrainedSetPartitioner(frozenset({1}), memory)]
)
def test_no_budget_and_no_parameters_are_served_the_code_of_others(make):
    kinds = [SavedMemory(budget=b, parameters=p) for b in (0.5, 1.0) for p in ((), (1,))]
    assert len({make(memory).uuid() for memory in kinds}) == 4
