"""Save a training in progress to a folder, and continue it on the same or another number of ranks.

Tensors are written as a distributed checkpoint of torch's, to which each rank adds what it holds. The
optimizer's state is written as it is: parameters that were never trained have none, and frozen parameters may
have some. torch's own helpers would create state for the former and lose that of the latter.
"""

import contextlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gtcompile.capture.model_io import unwrap
from gtcompile.capture.rng import check_random_state, random_state, restore_random_state
from gtcompile.distributed.fsdp import sharded
from gtcompile.distributed.ranks import Ranks
from gtcompile.errors import GTCompileError
from gtcompile.files import write_atomically
from gtcompile.state.same_model import Shapes, check_same_model, shapes_of
from gtcompile.state.shadow_optimizer import innermost
from gtcompile.state.trained_set import enter_shards
from gtcompile.training.adaptive import AdaptiveBackprop
from gtcompile.training.ddp import ranks_of

_LATEST, _VALUES = "latest", "values.pt"


def save_training(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    adaptive: AdaptiveBackprop,
    progress: Mapping[str, Any],
) -> None:
    """Write everything that is needed to continue a training; all ranks call it between two optimizer steps.

    At every moment `folder` holds the former state or the new one, complete.

    Args:
        folder: on a file system that all ranks see; created if it does not exist.
        model: plain, compiled, in `DistributedDataParallel`, or sharded with `fully_shard`.
        optimizer: the one that trains the model's parameters.
        adaptive: what chooses the trained set.
        progress: further values to restore, such as the step and the scheduler's state; plain values and
            tensors.

    Raises:
        GTCompileError: on all ranks, if one of them could not write; gives the reason.
    """
    ranks, path = ranks_of(model), Path(folder)
    enter_shards(model)
    parameters, weights = _by_name(model), unwrap(model).state_dict()
    state = {
        f"{fqn}/{key}": _State(fqn, key, value)
        for fqn, parameter in parameters.items()
        for key, value in innermost(optimizer).state.get(parameter, {}).items()
    }
    tensors = {name: kept.value for name, kept in state.items() if isinstance(kept.value, torch.Tensor)}
    values = {
        "weights": shapes_of(weights),
        "groups": _groups(optimizer, parameters),
        "state": {name: kept.described(parameters) for name, kept in state.items()},
        "adaptive": adaptive.state_dict(),
        "random": ranks.gather(random_state()),
        "progress": dict(progress),
    }
    try:
        name = ranks.from_first(lambda: _begin_saving(path))
        with _among(ranks) as processes:
            save({"weights": weights, "state": tensors}, checkpoint_id=path / name, **processes)
        ranks.from_first(lambda: _finish_saving(path, name, values))
    except (OSError, GTCompileError, CheckpointException) as error:
        raise GTCompileError(
            f"the training could not be saved, and {path} holds what it held before: {_reason(error)}"
        ) from error


def load_training(
    folder: str | Path, model: nn.Module, optimizer: Optimizer, adaptive: AdaptiveBackprop
) -> dict[str, Any]:
    """Continue from what `save_training` wrote; all ranks call it, and there may be another number of them.

    With the same number of ranks and the same batches, the training continues bit for bit. With another
    number, gradients are added in another order, and ranks that did not exist before keep their random state.

    Args:
        folder: the folder given to `save_training`.
        model: has the same parameters; their values, frozen or not, are replaced.
        optimizer: has the same parameters in the same groups; its state is replaced.
        adaptive: of this model and optimizer; its budget, patterns and history are replaced.

    Returns:
        The `progress` given to `save_training`.

    Raises:
        ValueError: there is no saved training, or it is of another model, optimizer or policy; nothing has
            changed.
    """
    ranks, path = ranks_of(model), Path(folder)
    enter_shards(model)
    parameters, weights = _by_name(model), unwrap(model).state_dict()
    current, values = ranks.together(lambda: _read(path))
    ranks.together(lambda: _refuse_other(path, values, shapes_of(weights), _groups(optimizer, parameters)))
    ranks.together(lambda: adaptive.check_state(values["adaptive"]))
    ranks.together(lambda: check_random_state(*values["random"]))
    state = {name: _allocate(parameters, kept) for name, kept in values["state"].items() if "shape" in kept}
    with _among(ranks) as processes:
        load({"weights": weights, "state": state}, checkpoint_id=current, **processes)
    unwrap(model).load_state_dict(weights)
    _replace_state(optimizer, parameters, values, state)
    adaptive.load_state_dict(values["adaptive"])
    if ranks.rank < len(values["random"]):
        restore_random_state(values["random"][ranks.rank])
    progress: dict[str, Any] = values["progress"]
    return progress


@dataclass(frozen=True, slots=True)
class _State:
    """One entry of the optimizer's state of one parameter."""

    fqn: str
    key: str
    value: Any

    def described(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """Describe a tensor, so that it can be allocated before it is read; keep any other value itself.

        Raises:
            GTCompileError: the value is sharded and has another shape than its parameter.
        """
        entry = {"fqn": self.fqn, "key": self.key}
        if not isinstance(self.value, torch.Tensor):
            return entry | {"value": self.value}
        alike = self.value.dim() > 0 and self.value.shape == parameters[self.fqn].shape
        if isinstance(self.value, DTensor) and not alike:
            raise GTCompileError(
                f"the optimizer keeps {self.key} of {self.fqn} sharded in another shape than the parameter, "
                f"which cannot be saved; use an optimizer such as AdamW"
            )
        shape, dtype = list(self.value.shape), str(self.value.dtype).removeprefix("torch.")
        return entry | {
            "shape": shape,
            "dtype": dtype,
            "alike": alike,
            "host": self.value.device.type == "cpu",
        }


def _allocate(parameters: Mapping[str, nn.Parameter], kept: Mapping[str, Any]) -> torch.Tensor:
    """Make an empty tensor to read one entry of the state into, sharded as its parameter is now."""
    parameter, dtype = parameters[kept["fqn"]], getattr(torch, kept["dtype"])
    if kept["alike"]:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(kept["shape"], dtype=dtype, device="cpu" if kept["host"] else parameter.device)


def _replace_state(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    values: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
) -> None:
    """Replace the optimizer's state and hyperparameters by those that were read."""
    inner = innermost(optimizer)
    inner.state.clear()
    for name, kept in values["state"].items():
        inner.state[parameters[kept["fqn"]]][kept["key"]] = state[name] if name in state else kept["value"]
    for group, saved in zip(inner.param_groups, values["groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})


def _by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    return {fqn: sharded(parameter) for fqn, parameter in unwrap(model).named_parameters()}


def _groups(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, with FQNs instead of parameters."""
    names = {parameter: fqn for fqn, parameter in parameters.items()}
    groups = innermost(optimizer).param_groups
    return [{**group, "params": [names[sharded(p)] for p in group["params"]]} for group in groups]


def _refuse_other(
    path: Path,
    values: Mapping[str, Any],
    weights: Shapes,
    groups: list[dict[str, Any]],
) -> None:
    check_same_model(values["weights"], weights, f"{path} holds the training")
    if [group["params"] for group in groups] != [group["params"] for group in values["groups"]]:
        raise ValueError(f"{path} holds the training of an optimizer with other parameters in its groups")


@contextlib.contextmanager
def _among(ranks: Ranks) -> Iterator[dict[str, Any]]:
    """Yield the arguments for the processes that share a checkpoint; silence a warning about a single one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield {"process_group": ranks.group, "no_dist": ranks.group is None}


def _begin_saving(path: Path) -> str:
    """Return the name of a new folder to write into; remove what an interrupted save left."""
    path.mkdir(parents=True, exist_ok=True)
    for unfinished in path.glob(f".{_LATEST}.*"):
        unfinished.unlink()
    current = _latest(path)
    _remove_all_but(path, current)
    return f"state-{int(current.rpartition('-')[2]) + 1 if current else 0}"


def _finish_saving(path: Path, name: str, values: Mapping[str, Any]) -> None:
    """Write the values, then make the new folder the current state, then remove the former one."""
    write_atomically(path / name / _VALUES, lambda file: _save(values, file))
    write_atomically(path / _LATEST, lambda file: file.write_text(name, "utf-8"))
    _remove_all_but(path, name)


def _save(values: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch hides that there is no room
        torch.save(dict(values), file)


def _latest(path: Path) -> str | None:
    file = path / _LATEST
    return file.read_text("utf-8") if file.is_file() else None


def _remove_all_but(path: Path, name: str | None) -> None:
    for old in path.glob("state-*"):
        if old.name != name:
            shutil.rmtree(old)


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
    name = _latest(path)
    if name is None:
        raise ValueError(f"nothing to continue: {path} holds no training saved by save_training")
    return path / name, torch.load(path / name / _VALUES, map_location="cpu", weights_only=True)


def _reason(error: BaseException) -> str:
    """The error of the first rank that failed."""
    if isinstance(error, CheckpointException):
        rank, (failure, _) = sorted(error.failures.items())[0]
        return f"rank {rank}: {type(failure).__name__}: {failure}"
    return str(error)
