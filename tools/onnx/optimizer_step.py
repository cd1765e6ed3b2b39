"""The update of an optimizer as a function of plain tensors: gradients and old values to new values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gtcompile.tools.onnx.options import OptimizerName

LR, STEP = "optimizer.lr", "optimizer.step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The optimizer whose update is part of the step; hyperparameters as in `torch.optim`."""

    name: OptimizerName
    """`sgd` without momentum, or `adamw`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 1e-2
    """AdamW's decoupled decay, SGD's L2 term; per step it is multiplied by the learning rate."""


class OptimizerStep(nn.Module):
    """The update of the trained parameters, as a function of a flat list of tensors.

    Args:
        update: the optimizer.
        trained: FQNs, in order.
    """

    def __init__(self, update: Update, trained: Sequence[str]) -> None:
        super().__init__()
        self.update, self.trained = update, tuple(trained)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        kinds = ["parameter", "gradient"]
        scalars = [LR]
        if self.update.name == "adamw":
            kinds, scalars = [*kinds, "moment1", "moment2"], [LR, STEP]
        return (*scalars, *(f"{kind}.{fqn}" for kind in kinds for fqn in self.trained))

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        kinds = ["new_parameter"]
        if self.update.name == "adamw":
            kinds += ["new_moment1", "new_moment2"]
        return tuple(f"{kind}.{fqn}" for kind in kinds for fqn in self.trained)

    def examples(self, parameters: Mapping[str, nn.Parameter]) -> list[torch.Tensor]:
        """One example per name in `input_names`, each a tensor of its own."""
        names = (name.partition(".") for name in self.input_names)
        return [
            torch.tensor(1.0) if kind == "optimizer" else parameters[fqn].detach().clone()
            for kind, _, fqn in names
        ]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the outputs in the order of `output_names` from tensors in the order of `input_names`."""
        inputs = dict(zip(self.input_names, tensors, strict=True))
        update = _sgd if self.update.name == "sgd" else _adamw
        new = [update(self.update, fqn, inputs) for fqn in self.trained]
        return tuple(value for of_one_kind in zip(*new, strict=True) for value in of_one_kind)


def _sgd(update: Update, fqn: str, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    old = inputs[f"parameter.{fqn}"]
    return (old - inputs[LR] * (inputs[f"gradient.{fqn}"] + update.weight_decay * old),)


def _adamw(update: Update, fqn: str, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Loshchilov and Hutter's AdamW, in the order of operations of `torch.optim.AdamW`."""
    lr, step, (one, two) = inputs[LR], inputs[STEP], update.betas
    old, gradient = inputs[f"parameter.{fqn}"], inputs[f"gradient.{fqn}"]
    m = inputs[f"moment1.{fqn}"] * one + gradient * (1 - one)
    v = inputs[f"moment2.{fqn}"] * two + gradient * gradient * (1 - two)
    denominator = v.sqrt() / (1 - torch.pow(two, step)).sqrt() + update.eps
    decayed = old * (1 - lr * update.weight_decay)
    return decayed - lr / (1 - torch.pow(one, step)) * m / denominator, m, v
