"""Decoders with random weights to train, and every way to train them that the benchmarks compare."""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from gtcompile import compile_blocks, train_only
from gtcompile.compiler.blocks import find_blocks
from gtcompile.tools.bench.baselines import Candidate, Subject, Trained, freeze

UNLIMITED = 10_000
"""A recompile limit that no benchmark reaches."""


def opt_shape(layers: int, hidden: int, vocabulary: int, length: int) -> OPTConfig:
    """A decoder of OPT's shape: 4 x hidden inside, biases, layer norms, heads of 64."""
    return OPTConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
        max_position_embeddings=length,
    )


def llama_shape(layers: int, hidden: int, vocabulary: int, length: int) -> LlamaConfig:
    """A decoder of Llama's shape: a gated 8/3 x hidden inside, no biases, RMS norms, grouped heads."""
    heads = max(hidden // 64, 1)
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        max_position_embeddings=length,
    )


def wide_llama_shape(layers: int, hidden: int, vocabulary: int, length: int) -> LlamaConfig:
    """Llama's shape as its models of a billion parameters have it: 4 x hidden inside, a tied head."""
    config = llama_shape(layers, hidden, vocabulary, length)
    config.intermediate_size, config.tie_word_embeddings = 4 * hidden, True
    return config


def qwen3_shape(layers: int, hidden: int, vocabulary: int, length: int) -> Qwen3Config:
    """A decoder of Qwen3's shape: a gated 3 x hidden inside, heads of 128 with norms, a tied head."""
    heads = max(hidden // 64, 2)
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=128,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A decoder with random weights and the batches it is trained on."""

    shape: Callable[[int, int, int, int], PretrainedConfig]
    """Makes a configuration from layers, hidden size, vocabulary and length."""
    layers: int
    hidden: int
    vocabulary: int
    rows: int
    """Sequences per batch."""
    length: int
    """Tokens per sequence."""
    device: torch.device
    dtype: torch.dtype
    """Type of weights, activations and moments."""

    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        config = self.shape(self.layers, self.hidden, self.vocabulary, self.length)
        config.use_cache = False
        return config

    def model(self) -> PreTrainedModel:
        """The model with random weights, the same every time."""
        torch.manual_seed(0)
        with self.device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config(), dtype=self.dtype)
        model.train()
        return model

    def batch(self) -> dict[str, torch.Tensor]:
        """Random tokens, all of them labelled."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary, (self.rows, self.length), generator=generator).to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def __str__(self) -> str:
        kind = self.shape.__name__.removesuffix("_shape").upper()
        shape = f"{kind}-shaped decoder, {self.layers} layers, width {self.hidden}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{shape}, vocabulary {self.vocabulary}, batches of {self.rows} x {self.length}, {dtype}"


_SMALL = {"layers": 12, "hidden": 512, "vocabulary": 8192, "rows": 4, "length": 128}
WORKLOADS: Mapping[str, Mapping[str, Any]] = {
    "opt": {"shape": opt_shape, **_SMALL},
    "llama": {"shape": llama_shape, **_SMALL},
    "opt-2.7b": {
        "shape": opt_shape,
        "layers": 32,
        "hidden": 2560,
        "vocabulary": 50272,
        "rows": 4,
        "length": 512,
    },
    "llama-3b": {
        "shape": llama_shape,
        "layers": 28,
        "hidden": 3072,
        "vocabulary": 128256,
        "rows": 4,
        "length": 512,
    },
}
"""Fields of `Workload` by name; the two large ones are for a GPU."""


def whole(subject: Subject, recompile_limit: int | None = None) -> Candidate:
    """`torch.compile` of the model with `requires_grad_`."""
    return Candidate(subject, _compile_whole, freeze, recompile_limit)


def whole_with_reset(subject: Subject) -> Candidate:
    """`torch.compile` of the model, reset for every trained set."""
    return Candidate(subject, _compile_whole, _reset_and_freeze)


def hoisted_blocks(subject: Subject, **options: Any) -> Candidate:
    """`gtcompile.compile_blocks` with `train_only`; options are those of `compile_blocks`."""
    return Candidate(subject, functools.partial(compile_blocks, **options), train_only)


def everything_compiled(subject: Subject) -> Candidate:
    """Hoisted blocks, and `torch.compile` for every other module with parameters: embeddings, norm, head."""
    return Candidate(subject, _compile_the_rest_too, train_only)


def _reset_and_freeze(model: nn.Module, trained: Trained | None) -> None:
    torch.compiler.reset()
    freeze(model, trained)


def _compile_whole(model: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return compiled


def _compile_the_rest_too(model: nn.Module) -> nn.Module:
    inside = {module for name in find_blocks(model) for module in model.get_submodule(name).modules()}
    rest = [m for m in model.modules() if m not in inside and any(True for _ in m.parameters(recurse=False))]
    compile_blocks(model)
    for module in rest:
        module.compile()
    return model


def random_sets(names: Sequence[str], count: int, seed: int) -> list[Trained]:
    """Trained sets of random sizes, none empty."""
    draw = random.Random(seed)
    return [frozenset(draw.sample(names, draw.randint(1, len(names)))) for _ in range(count)]
