"""Ways to train part of a decoder, side by side: eager, compiled whole, compiled block by block, hoisted."""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedModel

from gtcompile.capture.model_io import loss_of
from gtcompile.compiler.blocks import compile_blocks, find_blocks
from gtcompile.state.trained_set import train_only
from gtcompile.torch_internals import dynamo_config, dynamo_counters

Trained = frozenset[str]
PLENTY = 10_000
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A decoder with random weights and the batches it is trained on."""

    shape: Callable[[int, int, int, int], PretrainedConfig]
    """From layers, hidden size, vocabulary and length to a configuration."""
    layers: int
    hidden: int
    vocabulary: int
    rows: int
    """Sequences per batch."""
    length: int
    """Tokens per sequence."""
    device: torch.device
    dtype: torch.dtype
    """Of weights, activations and moments."""

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


WORKLOADS: Mapping[str, Mapping[str, Any]] = {
    "opt": {"shape": opt_shape, "layers": 12, "hidden": 512, "vocabulary": 8192, "rows": 4, "length": 128},
    "llama": {
        "shape": llama_shape,
        "layers": 12,
        "hidden": 512,
        "vocabulary": 8192,
        "rows": 4,
        "length": 128,
    },
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


class Trainee(Protocol):
    """What rivals train, each a copy of its own."""

    def model(self) -> nn.Module:
        """A model that no other rival has."""

    def batch(self) -> Mapping[str, Any]:
        """The batch of every step, labels included."""


class Rival:
    """One way to train part of a model.

    Args:
        workload: what to train.
        prepare: compiles the model and returns what is called.
        choose: has exactly these parameters trained from the next step on; None trains everything.
        recompile_limit: Dynamo's, for as long as this rival runs; None leaves the default.
    """

    def __init__(
        self,
        workload: Trainee,
        prepare: Callable[[nn.Module], nn.Module],
        choose: Callable[[nn.Module, Trained | None], object],
        recompile_limit: int | None = None,
    ) -> None:
        self._model = workload.model()
        self._batch = workload.batch()
        self._run = prepare(self._model)
        self._choose = choose
        self._limit = recompile_limit
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6, fused=True)

    @property
    def model(self) -> nn.Module:
        """The model as its author wrote it, though its blocks may be compiled."""
        return self._model

    @property
    def callable(self) -> nn.Module:
        """What is called, with the same parameters."""
        return self._run

    @property
    def batch(self) -> Mapping[str, Any]:
        """What every step trains on."""
        return self._batch

    def switch(self, trained: Trained | None) -> None:
        """Train exactly these parameters from the next step on."""
        self._choose(self._model, trained)

    def loss(self) -> torch.Tensor:
        """The forward pass of a step."""
        with self._limits():
            return loss_of(self._run(**self._batch))

    def step(self) -> None:
        """One training step: forward, backward, AdamW."""
        with self._limits():
            loss_of(self._run(**self._batch)).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def switch_and_step(self, trained: Trained | None) -> None:
        """The first step with another trained set."""
        self.switch(trained)
        self.step()

    def forget_moments(self) -> None:
        """Drop the optimizer's state, so that the next step makes it for what is trained."""
        self._optimizer.state.clear()

    @contextlib.contextmanager
    def _limits(self) -> Iterator[None]:
        if self._limit is None:
            yield
            return
        with dynamo_config.patch(recompile_limit=self._limit, accumulated_recompile_limit=self._limit):
            yield


def eager(workload: Trainee) -> Rival:
    """Eager PyTorch with `requires_grad_`."""
    return Rival(workload, lambda model: model, freeze)


def whole(workload: Workload, recompile_limit: int | None = None) -> Rival:
    """`torch.compile` of the model with `requires_grad_`."""
    return Rival(workload, _compile_whole, freeze, recompile_limit)


def whole_with_reset(workload: Workload) -> Rival:
    """`torch.compile` of the model, started afresh for every trained set."""
    return Rival(workload, _compile_whole, _reset_and_freeze)


def plain_blocks(workload: Trainee, recompile_limit: int | None = None) -> Rival:
    """Every block compiled by `torch.compile`, with `requires_grad_`."""
    return Rival(workload, _compile_each_block, freeze, recompile_limit)


def hoisted_blocks(workload: Workload, **options: Any) -> Rival:
    """`gtcompile.compile_blocks` with `train_only`; options are those of `CompileOptions`."""
    return Rival(workload, functools.partial(compile_blocks, **options), train_only)


def everything_compiled(workload: Trainee) -> Rival:
    """Hoisted blocks, and `torch.compile` for every other module with parameters: embeddings, norm, head."""
    return Rival(workload, _compile_the_rest_too, train_only)


def freeze(model: nn.Module, trained: Trained | None) -> None:
    """Let `requires_grad` be true for exactly these parameters; None for all."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained is None or name in trained)
        parameter.grad = None


def _reset_and_freeze(model: nn.Module, trained: Trained | None) -> None:
    torch.compiler.reset()
    freeze(model, trained)


def _compile_whole(model: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return compiled


def _compile_each_block(model: nn.Module) -> nn.Module:
    for name in find_blocks(model):
        model.get_submodule(name).compile()
    return model


def _compile_the_rest_too(model: nn.Module) -> nn.Module:
    inside = {module for name in find_blocks(model) for module in model.get_submodule(name).modules()}
    rest = [m for m in model.modules() if m not in inside and any(True for _ in m.parameters(recurse=False))]
    compile_blocks(model)
    for module in rest:
        module.compile()
    return model


def random_sets(names: Sequence[str], count: int, seed: int) -> list[Trained]:
    """Trained sets of all sizes, none empty."""
    draw = random.Random(seed)
    return [frozenset(draw.sample(names, draw.randint(1, len(names)))) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Compilations:
    """What `torch.compile` has done so far in this process."""

    captures: int
    """Graphs Dynamo captured."""
    compiled: int
    """Graphs Inductor compiled or fetched from its cache."""

    def __sub__(self, earlier: "Compilations") -> "Compilations":
        """What was done since."""
        return Compilations(self.captures - earlier.captures, self.compiled - earlier.compiled)


def compilations() -> Compilations:
    """What `torch.compile` has done so far in this process."""
    inductor = dynamo_counters["inductor"]
    outcomes = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
    compiled = sum(inductor[outcome] for outcome in outcomes)
    return Compilations(dynamo_counters["stats"]["unique_graphs"], compiled)
