"""Logits at labelled positions alone: the loss and the gradients of all logits, for fewer FLOPs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import gtcompile

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32, dropout=0.0)
    ),
}


def make_model(name="llama"):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def make_batch(labelled, rows=3, tokens=10, seed=0):
    """A batch whose labels are -100 except where `labelled` (rows * tokens booleans) is true."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    keep = torch.tensor(labelled).reshape(rows, tokens)
    return {"input_ids": ids, "labels": ids.where(keep, torch.tensor(-100))}


def every_third(rows=3, tokens=10):
    return [index % 3 == 0 for index in range(rows * tokens)]


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_all_logits_and_predicted_flops_are_counted(name):
    model, batch = make_model(name), make_batch(every_third())
    expected = loss_and_gradients(model, batch)
    everywhere = gtcompile.backward_costs(model, batch)
    gtcompile.only_labelled_logits(model)
    batch = gtcompile.add_labelled_positions(batch, multiple=4)
    costs = gtcompile.backward_costs(model, batch)
    with FlopCounterMode(display=False) as counter:
        found = loss_and_gradients(model, batch)
    assert_same(found, expected)
    assert costs.full_flops == counter.get_total_flops() < everywhere.full_flops


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.booleans(), min_size=20, max_size=20).filter(lambda labelled: any(labelled[1:10])),
    st.integers(1, 25),
)
def test_any_labels_and_any_multiple_give_the_same_loss_and_gradients(labelled, multiple):
    model, batch = make_model(), make_batch(labelled, rows=2)
    expected = loss_and_gradients(model, batch)
    gtcompile.only_labelled_logits(model)
    found = loss_and_gradients(model, gtcompile.add_labelled_positions(batch, multiple=multiple))
    assert_same(found, expected)


def test_compiled_blocks_train_a_part_with_the_same_gradients():
    model, batch = make_model(), make_batch(every_third())
    part = [name for name, _ in model.named_parameters() if "layers.1" in name]
    _, expected = loss_and_gradients(model, batch)
    gtcompile.only_labelled_logits(model)
    gtcompile.compile_blocks(model, compiler="eager")
    gtcompile.train_only(model, part)
    _, found = loss_and_gradients(model, gtcompile.add_labelled_positions(batch))
    assert found.keys() == set(part)
    for name in part:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_model_with_adapters_computes_labelled_logits_only():
    peft = pytest.importorskip("peft")
    model, batch = make_model(), make_batch(every_third())
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    expected = loss_and_gradients(model, batch)
    gtcompile.only_labelled_logits(model)
    batch = gtcompile.add_labelled_positions(batch, multiple=4)
    assert_same(loss_and_gradients(model, batch), expected)
    assert model(**batch).logits.shape == (1, 12, VOCABULARY)
    assert model.generate(batch["input_ids"], max_new_tokens=1, do_sample=False).shape == (3, 11)


def test_evaluation_batches_without_positions_and_removal_see_all_logits():
    model, batch = make_model(), make_batch(every_third())
    with_positions = gtcompile.add_labelled_positions(batch)
    handle = gtcompile.only_labelled_logits(model)
    assert model(**with_positions).logits.shape[0] == 1
    with pytest.warns(UserWarning, match="make batches with gtcompile.add_labelled_positions"):
        assert model(**batch).logits.shape == (3, 10, VOCABULARY)
    assert model.eval()(**with_positions).logits.shape == (3, 10, VOCABULARY)
    handle.remove()
    assert model.train()(**batch).logits.shape == (3, 10, VOCABULARY)
    assert model.loss_function.__name__ == "ForCausalLMLoss"


def test_a_sum_over_items_in_the_batch_is_divided_as_before():
    model, batch = make_model(), make_batch(every_third())
    expected = model(**batch, num_items_in_batch=7).loss
    gtcompile.only_labelled_logits(model)
    found = model(**gtcompile.add_labelled_positions(batch), num_items_in_batch=7).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_positions_without_labels_and_adapters_that_add_tokens_are_refused():
    peft = pytest.importorskip("peft")
    model, batch = make_model(), gtcompile.add_labelled_positions(make_batch(every_third()))
    handle = gtcompile.only_labelled_logits(model)
    with pytest.raises(gtcompile.GTCompileError, match="but labels is missing"):
        model(**{name: value for name, value in batch.items() if name != "labels"})
    handle.remove()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(model, config)
    gtcompile.only_labelled_logits(model)
    with pytest.raises(gtcompile.GTCompileError, match="adapters that add tokens"):
        model(**batch)


def test_a_model_or_batch_of_another_kind_is_refused_by_name():
    classifier = BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=32))
    with pytest.raises(gtcompile.GTCompileError, match="BertForSequenceClassification is none"):
        gtcompile.only_labelled_logits(classifier)
    decoder = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=8, num_layers=1, num_heads=1)
    )
    with pytest.raises(gtcompile.GTCompileError, match="T5ForConditionalGeneration is none"):
        gtcompile.only_labelled_logits(decoder)
    with pytest.raises(gtcompile.GTCompileError, match="Linear is none"):
        gtcompile.only_labelled_logits(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"rows, tokens\], got shape \[3\]"):
        gtcompile.add_labelled_positions({"labels": torch.zeros(3)})
    with pytest.raises(ValueError, match="got NoneType"):
        gtcompile.add_labelled_positions({})
    with pytest.raises(ValueError, match="multiple: expected at least 1, got 0"):
        gtcompile.add_labelled_positions({"labels": torch.zeros(2, 3)}, multiple=0)
