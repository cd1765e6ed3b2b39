"""Models that see what they are to predict are refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, PretrainedConfig, PreTrainedModel

from gtcompile.tools.data.causality import check_causal


def tiny(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.train()


def encoder(*, is_decoder: bool) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return tiny(BertConfig(vocab_size=40, is_decoder=is_decoder, **sizes))


def test_an_encoder_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BertLMHeadModel sees later tokens.*is_decoder"):
        check_causal(encoder(is_decoder=False), (5, 6, 7, 8))


@pytest.mark.parametrize("ids", [(5, 6, 7, 0), (5, 6), (5,), ()])
def test_a_causal_model_passes_and_is_as_it_was(ids: tuple[int, ...]) -> None:
    for model in (encoder(is_decoder=True), tiny(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40))):
        model.get_input_embeddings().eval()
        before = torch.random.get_rng_state()
        check_causal(model, ids)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert model.training
        assert not model.get_input_embeddings().training
