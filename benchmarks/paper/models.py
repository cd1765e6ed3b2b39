"""The models of the paper's experiments, from configurations written out here: nothing is downloaded."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
)

Batch = dict[str, torch.Tensor]


def _opt(hidden_size: int, layers: int, heads: int, **other: Any) -> OPTConfig:
    sizes: dict[str, Any] = {
        "ffn_dim": 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    embeddings: dict[str, Any] = {
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": hidden_size,
    }
    return OPTConfig(hidden_size=hidden_size, **sizes, **(embeddings | other))


def _bloomz_3b() -> BloomConfig:
    return BloomConfig(vocab_size=250880, hidden_size=2560, n_layer=30, n_head=32)


def _flan_t5_xl() -> T5Config:
    sizes: dict[str, Any] = {
        "vocab_size": 32128,
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 32,
    }
    untied: dict[str, Any] = {"tie_word_embeddings": False, "decoder_start_token_id": 0}
    return T5Config(feed_forward_proj="gated-gelu", **sizes, **untied)


PAPER_MODELS: Mapping[str, Callable[[], PretrainedConfig]] = {
    "OPT-350M": lambda: _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "OPT-1.3B": lambda: _opt(2048, 24, 32),
    "OPT-2.7B": lambda: _opt(2560, 32, 32),
    "OPT-6.7B": lambda: _opt(4096, 32, 32),
    "BLOOMZ-3B": _bloomz_3b,
    "FLAN-T5-XL": _flan_t5_xl,
}
"""Configuration by name."""


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration, its tensors on the meta device: shapes without weights."""
    config.use_cache = False
    auto_class: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(config)
    if isinstance(config, T5Config) and not config.scale_decoder_outputs:
        # transformers unties such a head only when it finds its weights in a checkpoint
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    model.train()
    return model


def make_batch(config: PretrainedConfig, rows: int, length: int, target_length: int) -> Batch:
    """One batch of token ids, all of them labelled.

    Args:
        config: of the model.
        rows: sequences.
        length: tokens per sequence, or per source of an encoder-decoder.
        target_length: tokens per target of an encoder-decoder.
    """
    ids = torch.ones(rows, length, dtype=torch.long)
    columns = target_length if config.is_encoder_decoder else length
    labels = torch.ones(rows, columns, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
