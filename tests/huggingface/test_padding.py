"""Batches padded, grouped by length or packed: the same gradients, and the FLOPs that were predicted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

import gtcompile
from gtcompile.graph.flops import count_flops
from gtcompile.testing import reference_gradients
from gtcompile.training.step_costs import CostsByShape

LONGEST, ROWS, WORDS = 24, 3, 61
UPPER = ["model.layers.1.*", "model.norm.weight"]


def make_model(attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().train()


@st.composite
def texts(draw):
    """Token ids with labels: of each text, the tokens from some position on."""
    rows = []
    for _ in range(ROWS):
        length = draw(st.integers(2, LONGEST))
        ids = draw(st.lists(st.integers(3, WORDS - 1), min_size=length, max_size=length))
        first = draw(st.integers(1, length - 1))
        rows.append({"input_ids": ids, "labels": [-100] * first + ids[first:]})
    return rows


def padded(rows, length=LONGEST):
    def filled(name, value):
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": filled("input_ids", 0),
        "attention_mask": torch.tensor(mask),
        "labels": filled("labels", -100),
    }


def grouped(rows):
    return padded(rows, max(len(row["input_ids"]) for row in rows))


def packed(rows):
    return dict(DataCollatorWithFlattening()(rows, return_tensors="pt"))


def gradients_and_flops(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with count_flops() as counter:
        model(**batch).loss.backward()
    return gradients, counter.get_total_flops()


def assert_same(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("make", [grouped, packed])
def test_without_padding_gradients_are_the_same_and_flops_as_predicted(make):
    model, plain = gtcompile.compile_blocks(make_model(), compiler="eager"), make_model()
    costs = CostsByShape(model, None)

    @settings(max_examples=12, deadline=None)
    @given(rows=texts(), trained=st.sampled_from([None, UPPER]))
    def check(rows, trained):
        gtcompile.train_only(model, trained)
        names = gtcompile.trained_parameters(model)
        batch = make(rows)
        gradients, flops = gradients_and_flops(model, batch)
        assert_same(gradients, reference_gradients(plain, padded(rows), names))
        assert flops == costs.of(batch, "step").costs.step_flops(names)

    check()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_texts_of_a_packed_batch_do_not_see_each_other(attention):
    model = make_model(attention)
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in (torch.randint(3, WORDS, (n,), generator=generator).tolist() for n in (9, 2, 17))
    ]
    batch = packed(rows)
    assert batch["position_ids"][0].tolist() == [*range(9), *range(2), *range(17)]
    expected, _ = gradients_and_flops(model, padded(rows))
    found, flops = gradients_and_flops(model, batch)
    assert_same(found, expected)
    # attention is that of one text as long as all together: the mask keeps texts apart, and saves nothing
    joined = {name: batch[name] for name in ("input_ids", "labels")}
    assert flops == gradients_and_flops(model, joined)[1]
