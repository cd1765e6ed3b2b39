"""The trained set follows names: parameters that are replaced, added, or thawed by hand."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gtcompile
from gtcompile import train_only, trained_parameters
from gtcompile.testing import reference_gradients


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return x + torch.tanh(self.fc(self.norm(x)))


class Model(nn.Module):
    """Its parameters are used by eager code before and after the blocks, or all by compiled code."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).pow(2).mean()


NAMES = sorted(name for name, _ in Model().named_parameters())


def eager(model):
    return model


def blocks(model):
    return gtcompile.compile_blocks(model, compiler="eager")


def whole(model):
    return torch.compile(model, backend="gtcompile", options={"compiler": "eager"})


def assign(model):
    """As checkpoints of large models are loaded."""
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def leave_meta(model):
    """New parameters under every name, as `to_empty` makes them of those on the meta device."""
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(weights)


def new_head(model):
    """As `resize_token_embeddings` does, but nobody copies `requires_grad`."""
    model.head = nn.Linear(8, 1)


def new_weight_in_a_block(model):
    model.blocks[1].fc.weight = nn.Parameter(torch.randn(8, 8))


def twice(model):
    assign(model)
    assign(model)


def nothing(_model):
    pass


CHANGES = [assign, leave_meta, new_head, new_weight_in_a_block, twice, nothing]


def trained_by_a_step(run, model):
    model.zero_grad(set_to_none=True)
    run(torch.randn(4, 8)).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("way", [eager, blocks, whole])
@settings(max_examples=5)
@given(data=st.data())
def test_the_set_is_what_it_was_whatever_is_replaced(way, data):
    model = Model()
    run = way(model)
    for _ in range(3):
        trained = data.draw(st.sets(st.sampled_from(NAMES), min_size=1))
        train_only(run, trained)
        if data.draw(st.booleans()):
            trained_by_a_step(run, model)
        data.draw(st.sampled_from(CHANGES))(model)
        if data.draw(st.booleans()):
            assert trained_parameters(run) == trained
        assert trained_by_a_step(run, model) == trained
        assert trained_parameters(run) == trained
    assert train_only(run, None) == set(NAMES)
    assert trained_by_a_step(run, model) == set(NAMES)


@pytest.mark.parametrize("way", [blocks, whole])
def test_a_set_chosen_before_parameters_were_replaced_holds_in_a_model_compiled_afterwards(way):
    model = Model()
    train_only(model, ["blocks.1.fc.weight"])
    assign(model)
    assert trained_by_a_step(way(model), model) == {"blocks.1.fc.weight"}


def test_a_replaced_parameter_of_a_tied_pair_is_what_the_pair_was():
    model = Model()
    model.blocks[1].fc.weight = model.blocks[0].fc.weight
    train_only(model, ["head.*"])
    model.blocks[1].fc.weight = nn.Parameter(torch.randn(8, 8))  # no longer tied
    assert trained_by_a_step(model, model) == {"head.weight", "head.bias"}


def test_a_parameter_keeps_its_state_under_a_new_name():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.low_rank = base, nn.Linear(8, 8)

        def forward(self, x):
            return self.base(x) + self.low_rank(x)

    model = Model()
    train_only(model, ["embed.*"])
    model.blocks[0].fc = Adapted(model.blocks[0].fc)
    expected = {f"embed.{kind}" for kind in ("weight", "bias")}
    added = {f"blocks.0.fc.low_rank.{kind}" for kind in ("weight", "bias")}
    assert trained_by_a_step(model, model) == expected | added
    assign(model)
    assert trained_by_a_step(model, model) == expected | added
    model.blocks[0].fc = model.blocks[0].fc.base
    assert trained_by_a_step(model, model) == expected == trained_parameters(model)


def test_new_parameters_are_announced_once_and_stay_selectable(caplog):
    model = Model()
    train_only(model, ["embed.*"])
    model.extra = nn.Linear(1, 1)
    with caplog.at_level(logging.WARNING):
        trained_by_a_step(model, model)
        trained_by_a_step(model, model)
    assert [record.getMessage() for record in caplog.records] == [
        "extra.bias, extra.weight: new since the trained set was chosen, so trained until train_only is "
        "called again"
    ]
    assert train_only(model, ["extra.bias"]) == {"extra.bias"} == trained_parameters(model)


def test_many_new_parameters_are_announced_in_one_line(caplog):
    model = Model()
    train_only(model, ["embed.*"])
    model.blocks.append(Block())
    model.blocks.append(Block())
    trained_parameters(model)
    assert "blocks.3.fc.bias and 3 more: new since" in caplog.text


@pytest.mark.parametrize("way", [eager, blocks])
def test_what_was_frozen_and_is_thawed_by_hand_is_trained(way, caplog):
    model = way(Model())
    train_only(model, ["head.weight"])
    model.embed.weight.requires_grad_(True)
    assert trained_by_a_step(model, model) == {"head.weight", "embed.weight"} == trained_parameters(model)
    assert "embed.weight: frozen by train_only and given requires_grad=True by hand" in caplog.text
    assert train_only(model, ["head.weight"]) == {"head.weight"} == trained_by_a_step(model, model)


def test_costs_and_reference_gradients_are_no_thawing_by_hand(caplog):
    model, batch = Model(), {"x": torch.randn(4, 8)}
    train_only(model, ["head.weight"])
    gtcompile.backward_costs(model, batch)
    reference_gradients(model, batch)
    assert trained_by_a_step(model, model) == {"head.weight"}
    assert "by hand" not in caplog.text


def test_functional_calls_with_other_tensors_replace_nothing():
    model = Model()
    train_only(model, ["head.weight"])
    others = {name: value.detach().clone() for name, value in model.named_parameters()}
    torch.func.functional_call(model, others, (torch.randn(4, 8),))
    torch.func.functional_call(model, {k: nn.Parameter(v) for k, v in others.items()}, (torch.randn(4, 8),))
    assert trained_by_a_step(model, model) == {"head.weight"} == trained_parameters(model)


def test_what_the_user_froze_is_not_thawed_when_it_is_replaced():
    model = Model()
    model.embed.requires_grad_(False)
    train_only(model, ["head.weight"])
    assign(model)
    assert train_only(model, None) == {name for name in NAMES if not name.startswith("embed")}


def test_an_embedding_that_transformers_resized_stays_frozen():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=32, num_hidden_layers=2, tie_word_embeddings=False, dropout=0.0, **sizes)
    model = gtcompile.compile_blocks(OPTForCausalLM(config), compiler="eager")
    trained = train_only(model, ["model.decoder.layers.1.fc1.weight"])
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    everything = len(list(model.parameters()))
    for size in (40, 48):
        model.resize_token_embeddings(size)
        model(**batch).loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
        assert trained_parameters(model) == trained
    assert len(train_only(model, None)) == everything
