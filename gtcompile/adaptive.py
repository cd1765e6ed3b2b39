"""Adaptive backpropagation in a training loop: measure, select, train that, again every epoch."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gtcompile.capture import list_parameters, unwrap
from gtcompile.dependencies import BackwardCosts, backward_costs
from gtcompile.errors import GTCompileError
from gtcompile.importance import check_batches, measure_importance
from gtcompile.restoration import restored, temporarily_training
from gtcompile.selection import Selection, check_budget_fraction, parameters_to_measure, select_parameters
from gtcompile.trained import train_only, trained_parameters

logger = logging.getLogger(__name__)


class AdaptiveBackprop:
    """Keeps a model training the parameters most worth it within a FLOPs budget.

    Call `reselect` with a few batches at the start of training and then every epoch or so; between the calls
    train as always. It works on a plain model, `torch.compile(model, backend="gtcompile")` and compiled
    blocks alike.

    Args:
        model: compiled or not; returns its scalar loss or an output with `.loss`.
        optimizer: the one that trains it.
        budget_fraction: share of a full step's FLOPs, forward and backward, that a step may take, in (0, 1].
        always: FQNs or shell-style patterns of parameters to train in any case.
        never: FQNs or shell-style patterns of parameters never to train.
        two_pass: measure importance as the paper does.

    Raises:
        ValueError: for a budget outside (0, 1].
        TypeError: for a single string where patterns are expected.
    """
