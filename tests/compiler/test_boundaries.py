"""Where the backward ends: boundaries, activation checkpointing over a frozen prefix, first forwards."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from gtcompile import compile_blocks, train_only
from gtcompile.compiler.boundaries import Calibration, boundary, calibrating, end_backward, needs_gradient
from gtcompile.graph.flops import count_flops
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


def test_inputs_that_require_grad_still_get_their_gradient():
    model = checkpointed(opt(), reentrant=False)
    compile_blocks(model, compiler="eager")
    train_only(model, TOP_TWO)
    model(**batch()).loss.backward()  # with an embedding's output that must not get one
    embedded = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=batch()["labels"]).loss.backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().sum() > 0


class Opaque(torch.autograd.Function):
    """A function written in Python, which may differentiate what it does not show."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_what_is_computed_from_boundaries_alone_needs_no_gradient():
    passed, parameter = boundary(torch.ones(3)), nn.Parameter(torch.ones(3))
    assert not needs_gradient(passed[passed > 0] * 2)
    assert needs_gradient(passed * parameter)
    assert needs_gradient(Opaque.apply(passed) + 1)
    assert needs_gradient(torch.ones(3, requires_grad=True) * 2)
    assert not needs_gradient(torch.ones(3))
    assert not needs_gradient("no tensor")


def test_what_frozen_parameters_alone_computed_needs_no_gradient():
    model = compile_blocks(nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))))
    train_only(model, ["1.*"])
    frozen, trained = model[0][0].weight, model[1][0].weight
    assert frozen.requires_grad  # for Dynamo's sake
    assert not needs_gradient(frozen * 2)
    assert needs_gradient(trained * 2)
    assert needs_gradient(frozen @ trained)


def test_a_boundary_shares_memory_requires_grad_and_lets_no_gradient_through():
    parameter = torch.ones(2, requires_grad=True)
    tensor = parameter * 2
    passed = boundary(tensor)
    assert passed.requires_grad
    assert passed.data_ptr() == tensor.data_ptr()
    assert needs_gradient(tensor)
    assert not needs_gradient(passed)
    passed.mul_(2)  # a leaf could not be written into
    assert tensor.tolist() == [4.0, 4.0]
    passed.sum().backward()
    assert parameter.grad is None


class Probe(nn.Module):
    """A model that says what `end_backward` leaves of a tensor in its forward, and in its blocks."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)
        self.block = nn.Linear(2, 2)
        self.block.compile()  # only looks compiled: it is not called
        self.calibration = Calibration(self, [self.block])

    def forward(self):
        for model in self.inner:
            model()
        seen = [calibrating(), end_backward(torch.ones(2, requires_grad=True) * 2).requires_grad]
        self.calibration.called(self.block)
        return [*seen, calibrating()]


def test_only_the_first_forward_is_a_calibration_and_it_ends_with_the_last_block():
    model = Probe()
    with torch.no_grad():
        assert model() == [False, False, False]
    assert model() == [True, True, False]
    assert model() == [False, False, False]


def test_a_model_ends_its_calibration_while_another_is_in_its_own():
    outer = Probe(Probe())
    assert outer() == [True, True, False]
    assert not calibrating()


def test_a_calibration_that_fails_is_over():
    class Failing(Probe):
        def forward(self):
            assert calibrating()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        Failing()()
    assert not calibrating()


def test_a_calibration_belongs_to_one_thread():
    class Elsewhere(Probe):
        def forward(self):
            with ThreadPoolExecutor(1) as thread:
                return calibrating(), thread.submit(calibrating).result()

    assert Elsewhere()() == (True, False)
