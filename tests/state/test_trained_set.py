"""Which parameters are trained now: patterns, ties, user-frozen ones, and optimizers."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gtcompile import train_only, trained_parameters
from gtcompile.graph.names import match_patterns, near_names
from gtcompile.state.trained_set import generation, is_trained
from tests.support.models import Recipe, Regression, make_batch, random_sets, selectable, step, trained_sets

NAMES = {f"layers.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        (["layers.2.weight"], {"layers.2.weight"}),
        (["layers.2.*"], {"layers.2.weight", "layers.2.bias"}),
        (["*.bias"], {f"layers.{i}.bias" for i in range(4)}),
        (["layers.[01].weight", "layers.3.bias"], {"layers.0.weight", "layers.1.weight", "layers.3.bias"}),
        (["layers.?.weight"], {f"layers.{i}.weight" for i in range(4)}),
        (["*"], NAMES),
        (("layers.1.bias", "layers.1.bias"), {"layers.1.bias"}),
        (iter(["layers.1.bias"]), {"layers.1.bias"}),
    ],
)
def test_patterns_match_whole_names_in_shell_style(patterns, trained):
    model = Regression()
    assert train_only(model, patterns) == trained == trained_parameters(model)


@pytest.mark.parametrize("pattern", ["weight", "layers.2", "Layers.2.weight", "layers.2.weigh", ""])
def test_a_pattern_that_matches_no_whole_name_is_refused(pattern):
    with pytest.raises(ValueError, match=r"matches no selectable parameter"):
        train_only(Regression(), [pattern])


def test_a_mistaken_name_lists_its_neighbours():
    with pytest.raises(ValueError, match=r"'layer.2.weight' matches no .*; near names: .*layers.2.weight"):
        train_only(Regression(), ["layer.2.weight"])


def test_each_pattern_must_match_and_nothing_changes_when_one_does_not():
    model = Regression()
    train_only(model, ["layers.0.*"])
    gc.collect()  # parameters of earlier tests that go away count as well
    before, count = trained_parameters(model), generation()
    with pytest.raises(ValueError, match="'nonsense'"):
        train_only(model, ["layers.1.*", "nonsense"])
    assert trained_parameters(model) == before
    assert generation() == count


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="expected at least one parameter"):
        train_only(Regression(), [])
    with pytest.raises(ValueError, match="Regression has no parameter with requires_grad=True"):
        train_only(Regression().requires_grad_(False), None)


def test_a_string_is_refused_instead_of_being_taken_letter_by_letter():
    with pytest.raises(TypeError, match=r"write \['layers.0.bias'\]"):
        train_only(Regression(), "layers.0.bias")


def test_a_parameter_in_place_of_its_name_is_refused():
    model = Regression()
    with pytest.raises(TypeError, match="expected FQNs or shell-style patterns, got a Parameter"):
        train_only(model, [model.layers[0].bias])


def test_none_trains_everything_again():
    model = Regression()
    train_only(model, ["layers.0.*"])
    assert train_only(model, None) == NAMES
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_everything_is_trained_to_begin_with():
    assert trained_parameters(Regression()) == NAMES


@pytest.mark.parametrize("name", ["embed.weight", "head.weight", "head.w*", "embed.we*"])
def test_a_tied_weight_goes_by_any_of_its_names(name):
    model = Recipe(("norm",), tied=True).model()
    assert train_only(model, [name]) == {"embed.weight"} == trained_parameters(model)
    step(model, make_batch())
    assert model.head.weight.grad is not None
    assert model.head.bias.grad is None


def test_parameters_the_user_froze_stay_frozen():
    model = Recipe(("partly unused",)).model()
    assert "layers.0.scale" not in trained_parameters(model)
    assert "layers.0.scale" not in train_only(model, ["layers.0.*"])
    train_only(model, None)
    assert not model.layers[0].scale.requires_grad
    with pytest.raises(ValueError, match=r"'layers.0.scale' matches no selectable parameter"):
        train_only(model, ["layers.0.scale"])


def test_freezing_drops_gradients_and_keeps_those_of_the_trained():
    model = Regression()
    step(model, make_batch())
    kept = model.layers[1].weight.grad.clone()
    train_only(model, ["layers.1.weight"])
    assert torch.equal(model.layers[1].weight.grad, kept)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"layers.1.weight"}


@settings(max_examples=30)
@given(st.lists(trained_sets(sorted(NAMES)), min_size=1, max_size=4))
def test_an_eager_model_has_requires_grad_set_for_exactly_the_trained(sets):
    model = Regression()
    for trained in sets:
        train_only(model, trained)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
        assert {name for name, p in model.named_parameters() if is_trained(p)} == trained
        step(model, make_batch())
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


def test_parameters_of_a_compiled_model_keep_requires_grad():
    model = Regression()
    compiled = torch.compile(model, backend="gtcompile", options={"compiler": "eager"})
    step(compiled, make_batch())
    train_only(compiled, ["layers.3.*"])
    step(compiled, make_batch())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "layers.3.weight",
        "layers.3.bias",
    }


def test_a_set_chosen_before_compiling_holds_afterwards():
    model = Regression()
    train_only(model, ["layers.3.*", "layers.1.bias"])
    compiled = torch.compile(model, backend="gtcompile", options={"compiler": "eager"})
    step(compiled, make_batch())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained_parameters(compiled)


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "Adam, foreach": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.1, foreach=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5, weight_decay=0.1),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2, weight_decay=0.1),
}


def snapshot(model, optimizer, names):
    """Weights and optimizer state, moments and step counts, of these parameters."""
    parameters = dict(model.named_parameters())
    state = {name: dict(optimizer.state[parameters[name]]) for name in names}
    return copy.deepcopy(({name: parameters[name].detach() for name in names}, state))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_leaves_frozen_parameters_bit_identical(name, compiled):
    model, batch = Recipe(("norm", "residual"), tied=True).model(), make_batch()
    optimizer = OPTIMIZERS[name](model.parameters())
    run = torch.compile(model, backend="gtcompile", options={"compiler": "eager"}) if compiled else model
    step(run, batch)
    optimizer.step()
    names = selectable(model)
    for trained in random_sets(names, 3):
        train_only(run, trained)
        frozen = sorted(set(names) - trained)
        before, moving = snapshot(model, optimizer, frozen), snapshot(model, optimizer, trained)
        for _ in range(2):
            step(run, batch)
            optimizer.step()
        torch.testing.assert_close(snapshot(model, optimizer, frozen), before, rtol=0, atol=0)
        after = snapshot(model, optimizer, trained)[0]
        assert not any(torch.equal(after[n], moving[0][n]) for n in trained)


def test_a_thawed_parameter_moves_again_with_the_moments_it_had():
    model, batch = Regression(), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(model, batch)
    optimizer.step()
    train_only(model, ["layers.0.*"])
    step(model, batch)
    optimizer.step()
    train_only(model, None)
    step(model, batch)
    optimizer.step()
    steps = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
    assert steps == {name: 3 if name.startswith("layers.0.") else 2 for name in NAMES}


def test_each_change_of_the_set_has_a_generation_of_its_own():
    model = Regression()
    seen = [generation()]
    for trained in (["layers.0.*"], ["layers.1.*"], None):
        train_only(model, trained)
        seen.append(generation())
    assert sorted(set(seen)) == seen


def test_models_do_not_share_their_sets():
    first, second = Regression(), Regression()
    train_only(first, ["layers.0.*"])
    assert trained_parameters(second) == NAMES


def test_a_frozen_model_is_not_kept_alive():
    model = Regression()
    train_only(model, ["layers.0.weight"])
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert not any(reference() is not None for reference in parameters)


def test_exact_names_go_before_patterns():
    assert match_patterns(["w[0]", "w0"], ["w[0]"]) == {"w[0]"}
    assert match_patterns(["w[1]", "w0"], ["w[0]"]) == {"w0"}


@given(st.lists(st.text("abc.[0]", min_size=1), min_size=1), st.data())
def test_every_name_matches_itself(names, data):
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1))
    assert match_patterns(names, chosen) == set(chosen)
    assert match_patterns(names, ["*"]) == set(names)


def test_names_like_no_other_are_answered_with_an_example():
    assert near_names("zzz", ["layers.0.weight"]) == "names look like layers.0.weight"
    assert near_names("zzz", []) == "names look like nothing"


def test_a_module_without_parameters_has_no_trained_set():
    assert trained_parameters(nn.Identity()) == frozenset()
    with pytest.raises(ValueError, match="Identity has no parameter"):
        train_only(nn.Identity(), None)
