"""AdaptiveBackprop with a prefix cache: what cached steps cost, and the mean of what was computed."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

import gtcompile
from gtcompile.graph.flops import count_flops
from tests.support.known_costs import shapes_captured_once

BLOCKS = 5


@pytest.fixture(scope="module", autouse=True)
def costs_captured_once():
    with shapes_captured_once():
        yield


def make_llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=BLOCKS, num_attention_heads=2, intermediate_size=24,
        num_key_value_heads=1, use_cache=False, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def make_bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=61, d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0, use_cache=False,
    )  # fmt: skip
    return BartForConditionalGeneration(config).train()


def make_batches(count, rows=2, tokens=7):
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(3, 61, (count, rows, tokens), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in data]


def make_adaptive(model, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    defaults = {"budget_fraction": 0.5, "policy": "last_layers", "prefix_cache": True}
    return optimizer, gtcompile.AdaptiveBackprop(model, optimizer, **defaults | options)


def step(model, optimizer, batch):
    """One step; its loss and the FLOPs of its forward and backward."""
    with count_flops() as counter:
        loss = model(**batch).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), counter.get_total_flops()


@torch.compiler.disable
def own_loss(model, batch):
    return model(**batch).loss


@pytest.mark.parametrize("loss_fn", [None, own_loss], ids=["captured by Dynamo", "operator by operator"])
@pytest.mark.parametrize("make", [make_llama, make_bart])
def test_what_a_cached_step_costs_is_predicted_and_counted(make, loss_fn):
    model, (batch,) = make(), make_batches(1)
    gtcompile.compile_blocks(model, compiler="eager")
    optimizer, adaptive = make_adaptive(model, loss_fn=loss_fn)
    adaptive.reselect([batch])
    predicted = adaptive.cached_step_flops
    assert predicted < adaptive.step_flops
    counted = [step(model, optimizer, batch)[1] for _ in range(4)]
    assert counted == [adaptive.step_flops] * 2 + [predicted] * 2  # it is stored, then compared, then used
    with adaptive.prefix_cache.pretend_hit():
        costs = gtcompile.backward_costs(model, batch, loss_fn=loss_fn)
    assert costs.step_flops(gtcompile.trained_parameters(model)) == predicted


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    policy=st.sampled_from(["best", "sampled", "last_layers", "rotating", "occasionally_full"]),
    budget=st.floats(0.42, 1.0),
    reselections=st.integers(1, 2),
    seed=st.integers(0, 5),
)
def test_training_is_the_same_and_the_mean_of_what_is_computed_is_counted(policy, budget, reselections, seed):
    batches, options = make_batches(3), {"policy": policy, "budget_fraction": budget, "seed": seed}

    def train(model, adaptive, optimizer):
        seen = []
        for _ in range(reselections):
            adaptive.reselect(batches)
            for batch in batches * 4:
                seen.append(step(model, optimizer, batch))
                adaptive.step()
            assert adaptive.spent_fraction <= budget
        return seen, adaptive.history

    plain, cached = make_llama(), make_llama()
    optimizer, adaptive = make_adaptive(plain, **options, prefix_cache=False)
    expected, history = train(plain, adaptive, optimizer)
    optimizer, adaptive = make_adaptive(cached, **options)
    found, own_history = train(cached, adaptive, optimizer)
    assert history == own_history
    assert [loss for loss, _ in found] == [loss for loss, _ in expected]
    assert all(flops <= whole for (_, flops), (_, whole) in zip(found, expected, strict=True))
    mean = sum(flops for _, flops in found) / len(found)
    assert adaptive.computed_fraction * history[0].full_flops == pytest.approx(mean, rel=1e-9)


def test_a_selection_of_the_same_set_keeps_what_is_cached():
    model, batches = make_llama(), make_batches(2)
    always = [name for name, _ in model.named_parameters() if "layers.4" in name]
    optimizer, adaptive = make_adaptive(model, policy="best", always=always, never=["model.layers.[0-2].*"])
    for _ in range(3):
        adaptive.reselect(batches)
        for batch in batches:
            step(model, optimizer, batch)
    # only the first epoch and the first step of the second, which compares, computed the prefix
    assert adaptive.prefix_cache.stats.hits == 3


def test_measuring_and_steps_before_the_first_selection_do_not_count():
    model, batches = make_llama(), make_batches(2)
    optimizer, adaptive = make_adaptive(model, policy="best")
    step(model, optimizer, batches[0])
    adaptive.reselect(batches)
    assert adaptive.computed_fraction == 0.0
    assert adaptive.cached_step_flops < adaptive.step_flops
    step(model, optimizer, batches[0])
    assert adaptive.computed_fraction == adaptive.step_fraction


def test_the_mean_goes_on_from_a_saved_state():
    def resume(state, **options):
        model = make_llama()
        optimizer, adaptive = make_adaptive(model, **options)
        adaptive.load_state_dict(state)
        return model, optimizer, adaptive

    model, batches = make_llama(), make_batches(2)
    optimizer, adaptive = make_adaptive(model)
    adaptive.reselect(batches)
    for batch in batches * 3:
        step(model, optimizer, batch)
    mean, state = adaptive.computed_fraction, json.loads(json.dumps(adaptive.state_dict()))
    model, optimizer, resumed = resume(state)
    assert resumed.computed_fraction == mean < adaptive.step_fraction
    step(model, optimizer, batches[0])
    assert resumed.computed_fraction == pytest.approx((6 * mean + adaptive.step_fraction) / 7)
    assert resume(state, prefix_cache=False)[2].computed_fraction is None
    del state["prefix"]  # of a training without a cache
    assert resume(state)[2].computed_fraction == 0.0


def test_a_folder_and_a_cache_of_ones_own_are_taken(tmp_path):
    model, (batch,) = make_llama(), make_batches(1)
    optimizer, adaptive = make_adaptive(model, prefix_cache=tmp_path / "prefix")
    adaptive.reselect([batch])
    for _ in range(2):
        step(model, optimizer, batch)
    assert len(list((tmp_path / "prefix").rglob("*.safetensors"))) == 2
    adaptive.prefix_cache.remove()
    cache = gtcompile.PrefixCache(model, max_bytes=10_000)
    assert make_adaptive(model, prefix_cache=cache)[1].prefix_cache is cache
    assert make_adaptive(model, prefix_cache=False)[1].prefix_cache is None


def test_what_cannot_be_cached_is_refused_by_the_constructor(tmp_path):
    model = make_llama()
    with pytest.raises(ValueError, match="made for another model"):
        make_adaptive(model, prefix_cache=gtcompile.PrefixCache(make_llama()))
    with pytest.raises(TypeError, match="expected prefix_cache=True, a folder or a PrefixCache, got 3"):
        make_adaptive(model, prefix_cache=3)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="folder that can be written to"):
        make_adaptive(model, prefix_cache=str(tmp_path / "file"))
    with pytest.raises(gtcompile.GTCompileError, match="no repeated blocks"):
        make_adaptive(torch.nn.Linear(2, 2))
