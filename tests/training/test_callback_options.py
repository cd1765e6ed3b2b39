"""Options of the callback: wrong ones are refused by its constructor, others survive a checkpoint."""

import json

import pytest

from gtcompile import AdaptiveBackpropCallback
from gtcompile.training.callback_options import CallbackOptions, Progress


@pytest.mark.parametrize(
    "arguments",
    [
        *({"budget_fraction": 0}, {"budget_fraction": 50}, {"every": 0}, {"every": True}, {"every": "week"}),
        *({"batches": 1}, {"batches": 2.5}, {"batches": "4"}, {"compiler": "nvcc"}, {"frozen_state": "lose"}),
        {"activation_memory_budget": 2},
        *({"budget_seconds": 0}, {"budget_seconds": -1.0}, {"budget_memory": 0}, {"budget_memory": -5}),
    ],
)
def test_values_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        AdaptiveBackpropCallback(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"budget_fraction": "half"}, {"always": "*"}, {"never": [1]}, {"policy": 3}),
        *({"compiled": "eager"}, {"two_pass": 1}),
        *({"budget_seconds": "1 s"}, {"budget_memory": 1.5}, {"budget_memory": "8GB"}),
    ],
)
def test_values_of_another_type_are_refused(arguments):
    with pytest.raises(TypeError, match="expected"):
        AdaptiveBackpropCallback(**arguments)


def test_a_policy_that_does_not_exist_is_refused_with_the_nearest_names():
    with pytest.raises(ValueError, match="no policy 'sample'; near names: sampled"):
        AdaptiveBackpropCallback(policy="sample")


def test_budgets_of_seconds_and_bytes_need_the_policy_that_keeps_them():
    options = CallbackOptions(budget_seconds=0.5, budget_memory=10**9)
    assert (options.budget_fraction, options.budget_seconds, options.budget_memory) == (1.0, 0.5, 10**9)
    assert (CallbackOptions().budget_fraction, CallbackOptions(0.7).budget_fraction) == (0.5, 0.7)
    for budget in ({"budget_seconds": 0.5}, {"budget_memory": 10**9}):
        with pytest.raises(ValueError, match="hold with policy=\"best\" alone, got the policy 'lisa'"):
            AdaptiveBackpropCallback(policy="lisa", **budget)
    saved = json.loads(json.dumps(options.to_json()))
    with pytest.raises(ValueError, match="trained with budget_memory=1000000000, this callback has 5"):
        CallbackOptions(budget_seconds=0.5, budget_memory=5).check_resumed(saved)


def test_one_batch_is_enough_within_each_batch():
    assert CallbackOptions(batches=1, two_pass=True).batches == 1


def test_a_callback_made_from_a_saved_state_has_the_same_options():
    callback = AdaptiveBackpropCallback(0.4, every=7, always=("head.*",), frozen_state="cpu")
    state = json.loads(json.dumps(callback.state()))
    assert AdaptiveBackpropCallback.from_state(state).state() == callback.state()


def test_other_options_than_the_saved_ones_are_refused_unless_they_concern_the_compiler():
    saved = json.loads(json.dumps(CallbackOptions(compiler="inductor", never=("a", "b")).to_json()))
    CallbackOptions(compiler="eager", compiled=False, never=("a", "b")).check_resumed(saved)
    with pytest.raises(ValueError, match=r"trained with never=\['a', 'b'\], this callback has \['a'\]"):
        CallbackOptions(never=("a",)).check_resumed(saved)


def test_progress_is_the_mean_over_the_steps():
    assert Progress().mean_fraction is None
    assert Progress().after_step(0.25).after_step(0.75).mean_fraction == 0.5
