"""Generation does not depend on batching; scores count every reference."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

from gtcompile.tools.data.answers import generate_answers, matches, score
from gtcompile.tools.data.batches import Encoded
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer


def test_rouge_counts_the_best_reference_of_each_example() -> None:
    best = score("rouge", ["the cat sat"], [["a dog barked", "the cat sat"]])
    assert best == {"rouge1": 100.0, "rouge2": 100.0, "rougeL": 100.0}


def test_rouge_does_not_depend_on_the_order_of_references() -> None:
    references = ["a dog sat down", "the cat", "cats sit here often"]
    assert score("rouge", ["the cat sat"], [references]) == score(
        "rouge", ["the cat sat"], [references[::-1]]
    )


def test_rouge_equals_a_value_worked_out_by_hand() -> None:
    # one of two words of the answer among the four of the reference: precision 1/2, recall 1/4, F = 1/3
    result = score("rouge", ["red lamp"], [["blue lamp over there"]])
    assert result["rouge1"] == pytest.approx(100 / 3)
    assert result["rouge2"] == 0.0


def test_scores_are_averaged_over_examples_not_over_batches() -> None:
    assert score("exact match", ["a b", "c", "d"], [["a b"], ["x"], ["y"]])["exact match"] == pytest.approx(
        100 / 3
    )


@pytest.mark.parametrize("answer", ["The Nile", "nile.", "  NILE  "])
def test_exact_match_ignores_case_articles_punctuation_and_spaces(answer: str) -> None:
    assert matches(answer, ["river Nile", "Nile"])


def test_exact_match_wants_the_whole_answer() -> None:
    assert not matches("Nile delta", ["Nile"])


def test_answers_and_references_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        score("rouge", ["a"], [["a"], ["b"]])


def decoder() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=260,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def encoder_decoder() -> PreTrainedModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=260, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_an_answer_does_not_depend_on_its_neighbours_in_the_batch(make: object, lengths: list[int]) -> None:
    model = make()  # type: ignore[operator]
    tokenizer = byte_tokenizer(model.config)
    prompts = [Encoded(tuple(range(10, 10 + length)), ()) for length in lengths]
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=4, batch_size=3)
    alone = [generate_answers(model, tokenizer, [prompt], max_new_tokens=4)[0] for prompt in prompts]
    assert together == alone


def test_generation_restores_the_training_mode_and_reports_progress() -> None:
    model = decoder().train()
    seen: list[int] = []
    prompts = [Encoded((5,), ()), Encoded((6, 7), ()), Encoded((8,), ())]
    generate_answers(
        model, byte_tokenizer(model.config), prompts, max_new_tokens=2, batch_size=2, on_progress=seen.append
    )
    assert model.training
    assert seen == [2, 3]


def test_beams_are_used_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    asked = []
    generate = model.generate

    def note(**options: Any) -> torch.Tensor:
        asked.append(options["num_beams"])
        return generate(**options)

    monkeypatch.setattr(model, "generate", note)
    generate_answers(model, byte_tokenizer(model.config), [Encoded((5,), ())], max_new_tokens=3, num_beams=3)
    assert asked == [3]
