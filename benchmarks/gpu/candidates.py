"""The ways to train that are compared: gtcompile, eager PyTorch, `torch.compile` and LoRA."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks.workloads import hoisted_blocks
from gtcompile.compiler.blocks import compile_blocks, find_blocks
from gtcompile.state.trained_set import train_only
from gtcompile.tools.bench.baselines import Candidate, Subject, Trained, eager, plain_blocks
from gtcompile.training.cuda_graphs import CudaGraphs, check_recordable
from gtcompile.training.graphed_step import GraphedStep

OURS, GENERATED, GRAPHED = "gtcompile", "gtcompile, generated random", "gtcompile, CUDA graph"
EAGER, PLAIN = "eager PyTorch", "torch.compile, blocks"
LORA, LORA_COMPILED = "LoRA, eager", "LoRA, torch.compile, blocks"
FULL_ONLY = (PLAIN, LORA, LORA_COMPILED)
"""Ways that are measured with one set: another would be compiled, or there is no choice."""
COMPILED = (OURS, PLAIN, LORA_COMPILED)
"""Ways that compile."""
RANK = 16
"""Rank of LoRA's adapters, on all linear layers except the head."""


class Graphed(Candidate):
    """gtcompile, with each step a CUDA graph."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject, compile_blocks, train_only)
        parameters = list(self._model.parameters())
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True, capturable=True)
        check_recordable(self._model, self._optimizer, processes=1)
        recorder = CudaGraphs(parameters[0].device)
        self._graphed = GraphedStep(self._model, self._optimizer, None, recorder)

    def step(self) -> None:
        """One training step: an ordinary one until a step is recorded, then a replay."""
        self._graphed(self._batch)

    def switch_and_step(self, trained: Trained | None) -> None:
        """Train another set until a step with it is recorded."""
        self.switch(trained)
        self.step()
        while not self._graphed.recorded:
            self.step()

    def forget_moments(self) -> None:
        """Drop the optimizer's state, and the recording, which has it built in."""
        self._graphed.forget()
        super().forget_moments()


def lora(subject: Subject, *, compiled: bool) -> Candidate:
    """Low-rank adapters in the type of the weights; every block compiled by `torch.compile`, or none."""
    return Candidate(subject, functools.partial(_adapt, compiled=compiled), _nothing_to_choose)


def _adapt(model: nn.Module, compiled: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    # adapters in float32, peft's default, would be slower beside weights in bf16
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for name in find_blocks(model) if compiled else ():
        model.get_submodule(name).compile()
    return adapted


def _nothing_to_choose(model: nn.Module, trained: Trained | None) -> None:
    """LoRA trains its adapters, whatever the budget."""


MAKERS: Mapping[str, Callable[[Subject], Candidate]] = {
    OURS: hoisted_blocks,
    GENERATED: functools.partial(hoisted_blocks, random="compiler"),
    GRAPHED: Graphed,
    EAGER: eager,
    PLAIN: plain_blocks,
    LORA: functools.partial(lora, compiled=False),
    LORA_COMPILED: functools.partial(lora, compiled=True),
}


def ways_of(workload: str) -> list[str]:
    """The ways that are compared on a workload: generated random numbers only matter with dropout."""
    return [way for way in MAKERS if way != GENERATED or workload.startswith("opt")]


def refusal(way: str, device: torch.device) -> str:
    """Why a way cannot be measured on a device; empty if it can."""
    return "CUDA graphs need a CUDA device" if way == GRAPHED and device.type != "cuda" else ""
