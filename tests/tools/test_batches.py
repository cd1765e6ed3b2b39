"""Examples become batches of one shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig, T5Config

from gtcompile.tools.data.batches import Collator, Encoded, Encoder, collator_for
from gtcompile.tools.data.formats import FORMATS, Example
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer

CONFIGS = [OPTConfig(vocab_size=260), LlamaConfig(vocab_size=260), T5Config(vocab_size=260)]


def encoder(config: PretrainedConfig, dataset: str = "scitldr", **limits: int) -> Encoder:
    limits = {"max_length": 64, "max_new_tokens": 16} | limits
    return Encoder(
        tokenizer=byte_tokenizer(config),
        format=FORMATS[dataset],
        encoder_decoder=bool(config.is_encoder_decoder),
        **limits,
    )


@settings(deadline=None)
@given(text=st.text())
@pytest.mark.parametrize("config", CONFIGS, ids=["opt", "llama", "t5"])
def test_bytes_decode_to_what_was_encoded(config: PretrainedConfig, text: str) -> None:
    tokenizer = byte_tokenizer(config)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.decode(ids) == text
    assert all(0 <= index < config.vocab_size for index in ids)


@pytest.mark.parametrize("config", CONFIGS, ids=["opt", "llama", "t5"])
def test_special_tokens_keep_the_ids_of_the_model(config: PretrainedConfig) -> None:
    tokenizer = byte_tokenizer(config)
    for role in ("pad", "bos", "eos"):
        known = getattr(config, f"{role}_token_id", None)
        assert known is None or getattr(tokenizer, f"{role}_token_id") == known
    assert tokenizer.pad_token_id not in tokenizer("any text at all")["input_ids"]


def test_ids_outside_the_vocabulary_are_replaced() -> None:
    tokenizer = byte_tokenizer(GPT2Config(vocab_size=300))  # its end-of-sequence token is 50256
    assert max(tokenizer.get_vocab().values()) < 300


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocabulary of 99 .* needs 259.*--tokenizer"):
        byte_tokenizer(LlamaConfig(vocab_size=99))


def test_a_decoders_prompt_ends_with_the_cue_and_the_answer_with_the_end_of_sequence() -> None:
    encode = encoder(OPTConfig(vocab_size=260))
    example = encode(Example("Words.", ("Short.", "other")))
    assert encode.tokenizer.decode(example.prompt) == "</s>Words. TL;DR:"
    assert encode.tokenizer.decode(example.answer) == " Short.</s>"


def test_a_question_is_closed_by_the_models_own_end_of_sequence() -> None:
    encode = encoder(LlamaConfig(vocab_size=260), "webquestions")
    prompt = encode(Example("question:who?", ("Ann",))).prompt
    assert prompt.count(encode.tokenizer.eos_token_id) == 1
    assert encode.tokenizer.decode(prompt).endswith("</s>answer:")


def test_an_encoder_reads_the_source_alone() -> None:
    encode = encoder(T5Config(vocab_size=260))
    example = encode(Example("Words.", ("Short.",)))
    assert encode.tokenizer.decode(example.prompt) == "Words.</s>"
    assert encode.tokenizer.decode(example.answer) == "Short.</s>"


@settings(deadline=None)
@given(source=st.text(min_size=1), answer=st.text(min_size=1))
@pytest.mark.parametrize("config", CONFIGS, ids=["opt", "llama", "t5"])
def test_nothing_exceeds_the_limits_and_the_cue_is_never_cut(
    config: PretrainedConfig, source: str, answer: str
) -> None:
    encode = encoder(config, max_length=32, max_new_tokens=8)
    example = encode(Example(source, (answer,)))
    assert len(example.answer) <= 8
    assert len(example.prompt) + (0 if encode.encoder_decoder else 8) <= 32
    if not encode.encoder_decoder:
        assert encode.tokenizer.decode(example.prompt).endswith(" TL;DR:")


def decoder_collator(**changes: int) -> Collator:
    sizes = {"pad_token": 0, "batch_size": 3, "input_length": 8, "target_length": 8} | changes
    return Collator(encoder_decoder=False, **sizes)


def test_prompt_and_padding_carry_no_loss() -> None:
    batch = decoder_collator(batch_size=1)([Encoded((5, 6, 7), (8, 9))])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 9, -100, -100, -100]]


def test_an_encoder_decoders_labels_are_a_sequence_of_their_own() -> None:
    collate = Collator(encoder_decoder=True, pad_token=0, batch_size=1, input_length=4, target_length=3)
    batch = collate([Encoded((5, 6), (8, 9))])
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0]]
    assert batch["labels"].tolist() == [[8, 9, -100]]


def test_a_short_batch_is_filled_with_copies_that_teach_nothing() -> None:
    batch = decoder_collator()([Encoded((5,), (6,))])
    assert batch["input_ids"].shape == (3, 8)
    assert (batch["input_ids"] == batch["input_ids"][0]).all()
    assert (batch["labels"][1:] == -100).all()
    assert batch["attention_mask"].any(dim=1).all()


def test_filling_a_batch_does_not_change_its_loss() -> None:
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=8)).eval()
    examples = [Encoded((5, 3), (6,)), Encoded((4,), (7, 2))]
    exact, filled = (decoder_collator(batch_size=size)(examples) for size in (2, 4))
    torch.testing.assert_close(model(**exact).loss, model(**filled).loss)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1), st.booleans())
def test_every_example_fits_the_one_shape_of_the_run(
    lengths: list[tuple[int, int]], encoder_decoder: bool
) -> None:
    examples = [Encoded((1,) * prompt, (2,) * answer) for prompt, answer in lengths]
    collate = collator_for(examples, encoder_decoder=encoder_decoder, pad_token=0, batch_size=4, limit=64)
    shapes = {tuple(tensor.shape for tensor in collate([example]).values()) for example in examples}
    assert len(shapes) == 1
    assert collate.input_length % 8 == 0


def test_a_longer_example_makes_a_longer_batch() -> None:
    batch = decoder_collator(batch_size=2)([Encoded((5,) * 9, (6,)), Encoded((5,), (6,))])
    assert {tensor.shape for tensor in batch.values()} == {(2, 10)}


def test_a_chat_is_written_by_the_tokenizers_template_and_its_beginning_is_cut() -> None:
    encode = encoder(LlamaConfig(vocab_size=260), max_length=24, max_new_tokens=8)
    example = Example((("user", "A long question?"),), ("Ann.",))
    with pytest.raises(ValueError, match="whose tokenizer has a chat template"):
        encode(example)
    encode.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    encoded = encode(example)
    assert encode.tokenizer.decode(encoded.prompt) == "<user>A long question?<assistant>"[-16:]
    assert encode.tokenizer.decode(encoded.answer) == "Ann.</s>"
