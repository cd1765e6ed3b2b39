"""Activation checkpointing as transformers enables it, with a frozen prefix under compiled blocks."""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from gtcompile.compiler.blocks import compile_blocks
from gtcompile.compiler.cuts import cut
from gtcompile.compiler.forced_leaves import wants_gradient
from gtcompile.graph.flops import count_flops
from gtcompile.state.trained_set import train_only
from gtcompile.testing import assert_same_gradients, reference_gradients

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
TOP_TWO = ["*layers.6.*", "*layers.7.*"]


def opt(attention: str = "sdpa") -> OPTForCausalLM:
    """Eight blocks and no dropout."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 128, "num_attention_heads": 4}
    config = OPTConfig(
        vocab_size=32,
        num_hidden_layers=8,
        max_position_embeddings=32,
        dropout=0.0,
        attn_implementation=attention,
        tie_word_embeddings=False,
        **sizes,
    )
    return OPTForCausalLM(config).train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def checkpointed(model: OPTForCausalLM, *, reentrant: bool) -> OPTForCausalLM:
    model.config.use_cache = False
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return model


def check_step(model, data) -> None:
    expected = reference_gradients(model, data)
    model.zero_grad(set_to_none=True)
    model(**data).loss.backward()
    assert_same_gradients(model, expected)


def backward_flops(model, data) -> int:
    loss = model(**data).loss
    with count_flops() as counter:
        loss.backward()
    return counter.get_total_flops()


@REENTRANT
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("enabled", ["before", "after"])
def test_a_frozen_prefix_is_neither_recomputed_nor_differentiated(reentrant, enabled, attention):
    plain, model, data = opt(attention), opt(attention), batch()
    train_only(plain, TOP_TWO)
    if enabled == "before":
        checkpointed(model, reentrant=reentrant)
    compile_blocks(model, compiler="eager")
    if enabled == "after":
        checkpointed(model, reentrant=reentrant)
    train_only(model, TOP_TWO)
    check_step(model, data)
    assert backward_flops(model, data) <= 1.35 * backward_flops(plain, data)


@REENTRANT
def test_gradients_are_right_for_one_set_after_another(reentrant):
    model, data = checkpointed(opt(), reentrant=reentrant), batch()
    compile_blocks(model, compiler="eager")
    for trained in (
        TOP_TWO,
        ["*embed_tokens*"],
        ["*layers.3.fc1.weight"],
        ["*embed_positions*"],
        ["lm_head*"],
        None,
    ):
        train_only(model, trained)
        check_step(model, data)


def test_inputs_that_ask_for_a_gradient_still_get_it():
    model = checkpointed(opt(), reentrant=False)
    compile_blocks(model, compiler="eager")
    train_only(model, TOP_TWO)
    model(**batch()).loss.backward()  # leaves a forced leaf and a decision behind
    embedded = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=batch()["labels"]).loss.backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().sum() > 0


class Opaque(torch.autograd.Function):
    """A function of Python's, which may differentiate what it does not show."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_what_is_computed_of_cuts_alone_wants_no_gradient():
    leaf, parameter = cut(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    assert not wants_gradient(leaf[leaf > 0] * 2)
    assert wants_gradient(leaf * parameter)
    assert wants_gradient(Opaque.apply(leaf) + 1)
    assert wants_gradient(torch.ones(3, requires_grad=True) * 2)
    assert not wants_gradient(torch.ones(3))
