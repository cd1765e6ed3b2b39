"""Save only the weights that were trained, and load them into the model that training began with.

A file holds the trained parameters and the buffers. Of every other parameter it holds shape, dtype and a
checksum: loading it into a model in which one of them differs is refused.
"""

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gtcompile.capture.model_io import list_parameters, unwrap
from gtcompile.distributed.ranks import Ranks
from gtcompile.errors import GTCompileError, some
from gtcompile.files import write_atomically
from gtcompile.graph.joint_graph import names_of
from gtcompile.graph.names import match_patterns
from gtcompile.state.ever_trained import ever_trained, mark_names_trained

logger = logging.getLogger(__name__)

FILE = "trained.safetensors"
_UNFINISHED = f".{FILE}.*"
"""Names of files that a kill left unfinished."""
_KEY = "gtcompile"
"""Of the description in the file's metadata."""
_SECONDS = 5
"""Between two lines of progress."""


@dataclass(frozen=True, slots=True)
class _Fingerprint:
    """What two equal tensors have in common."""

    shape: tuple[int, ...]
    dtype: str
    checksum: str

    def difference(self, other: "_Fingerprint") -> str:
        """Say in words how another tensor differs; empty if it does not."""
        if self.shape != other.shape:
            return f"has shape {list(other.shape)}, not {list(self.shape)}"
        if self.dtype != other.dtype:
            return f"is {other.dtype}, not {self.dtype}"
        return "" if self.checksum == other.checksum else "has other values"


def save_trained(model: nn.Module, folder: str | Path, *, also: Iterable[str] = ()) -> frozenset[str]:
    """Save only the parameters that were trained, a few megabytes where these are few.

    A parameter was trained if an optimizer of torch made a step while it had a gradient, or if `train_only`
    was told to train it by name, since gtcompile was first used in this process. Steps before a resumption
    count as well: `load_training`, `AdaptiveBackprop.load_state_dict`, the callback's checkpoints,
    `load_trained`, and the state of an optimizer that has some (SGD without momentum has none). Adapters of
    PEFT are saved whole, because their first values are random. Every buffer of the model's state dictionary
    is saved too: nothing says which of them training changed, such as the statistics of a batch norm.

    The file `trained.safetensors` also has the model's name and a checksum of every parameter that was not
    trained, so that `load_trained` refuses another base. A kill leaves the former file or the new one, whole.

    Args:
        model: plain, compiled or with adapters. In `DistributedDataParallel` all ranks call it, and the first
            one writes.
        folder: new or empty, or one that holds such a file, which is replaced.
        also: FQNs or shell-style patterns of further parameters to save: a head that was newly initialized
            and not trained, or what an earlier process trained.

    Returns:
        The FQNs of the saved parameters.

    Raises:
        ValueError: nothing was trained, a pattern matches nothing, the folder holds something else, or the
            model is sharded or without values.
        GTCompileError: the file could not be written; the folder holds what it held before.
    """
    path, inner = Path(folder), unwrap(model)
    wrapper = getattr(model, "_orig_mod", model)
    ranks = Ranks(wrapper.process_group if isinstance(wrapper, DistributedDataParallel) else None)

    def write() -> frozenset[str]:
        _refuse_without_values(inner)
        _refuse_other_folder(path)
        trained = _chosen(inner, also)
        tensors = _saved_tensors(inner, trained)
        _write(path, tensors, {_KEY: json.dumps(_description(inner, trained, tensors))})
        return trained

    return ranks.from_first(write)


def _chosen(model: nn.Module, also: Iterable[str]) -> frozenset[str]:
    """FQNs of the parameters to save: the trained ones, those that patterns name, and adapters."""
    trained = ever_trained(model) | match_patterns(names_of(list_parameters(model)), also)
    if not trained:
        raise ValueError(
            f"no parameter of this {type(model).__name__} was trained since gtcompile was first used in "
            f"this process; if it was trained before, name the parameters: also=[...]"
        )
    return trained | _adapters(model)


def _description(
    model: nn.Module, trained: frozenset[str], saved: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """What a file says besides the saved tensors, as JSON types."""
    untrained = {fqn: p for fqn, p in model.named_parameters() if fqn not in trained}
    fingerprints = _fingerprints({**untrained, **saved})
    return {
        "version": 1,
        "base": _name_of(model),
        "trained": sorted(trained),
        "tensors": {name: [f.shape, f.dtype, f.checksum] for name, f in fingerprints.items()},
    }


def load_trained(model: nn.Module, folder: str | Path) -> frozenset[str]:
    """Load what `save_trained` wrote into the model that its training began with.

    The model then equals the trained one: every parameter and every buffer of its state dictionary, bit for
    bit. Nothing changes if anything does not fit. The parameters count as trained: `save_trained` saves them
    again.

    Args:
        model: plain or compiled, with the values of the base. It has the same adapters, if there are any.
        folder: as given to `save_trained`.

    Returns:
        The FQNs of the loaded parameters.

    Raises:
        ValueError: there is no such file, it is damaged, or it is of another base; says what differs.
    """
    path, inner = Path(folder) / FILE, unwrap(model)
    _refuse_without_values(inner)
    description, tensors = _read(path)
    saved = {
        name: _Fingerprint(tuple(shape), dtype, checksum)
        for name, (shape, dtype, checksum) in description["tensors"].items()
    }
    damaged = [name for name, p in _fingerprints(tensors).items() if saved.get(name) != p]
    if damaged:
        raise ValueError(f"{path} is damaged: {some(damaged)} do not match their checksums; copy it again")
    present = dict(inner.named_parameters()) | dict(_buffers(inner))
    _refuse_other_base(path, description, saved, tensors.keys(), present)
    with torch.no_grad():
        for name, tensor in tensors.items():
            present[name].copy_(tensor)
    mark_names_trained(inner, description["trained"])
    return frozenset(description["trained"])


def _refuse_other_base(
    path: Path,
    description: Mapping[str, Any],
    saved: Mapping[str, _Fingerprint],
    loaded: Iterable[str],
    present: Mapping[str, torch.Tensor],
) -> None:
    """Refuse a model whose names, shapes, dtypes or untrained values are not those of the saved one."""
    loaded = frozenset(loaded)
    wrong = [f"{name} is missing" for name in sorted(saved.keys() - present.keys())]
    wrong += [f"{name} is new" for name in sorted(present.keys() - saved.keys())]
    known = sorted(saved.keys() & present.keys())
    for name in known:
        kind = dataclasses.replace(
            saved[name], shape=tuple(present[name].shape), dtype=str(present[name].dtype)
        )
        wrong += [f"{name} {said}" for said in [saved[name].difference(kind)] if said]
    if not wrong:  # values are read only if everything else fits
        values = _fingerprints({name: present[name] for name in known if name not in loaded})
        wrong += [f"{name} {said}" for name, p in values.items() if (said := saved[name].difference(p))]
    if wrong:
        base = f"{description['base']!r}" if description["base"] else "a model without a name"
        raise ValueError(
            f"{path} holds the trained weights of another base than this model: {some(wrong, '; ')}. It was "
            f"saved from {base}; load the weights that its training began with, adapters included. If a "
            f"parameter was initialized at random, save it too: save_trained(..., also=[...])"
        )


def _saved_tensors(model: nn.Module, trained: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors to save by name, tied weights once; buffers that share memory get copies of their own."""
    chosen = frozenset(trained)
    parameters = {fqn: p for fqn, p in model.named_parameters() if fqn in chosen}
    named = {**parameters, **dict(_buffers(model))}
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in named.items()
    }


def _buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of the state dictionary, those with several names once."""
    kept = model.state_dict(keep_vars=True).keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _adapters(model: nn.Module) -> frozenset[str]:
    """FQNs of PEFT's adapters, known by the attribute in which its layers list them."""
    inside = [
        f"{path}.{name}.".removeprefix(".")
        for path, module in model.named_modules()
        for name in getattr(module, "adapter_layer_names", ())
    ]
    prefixes = (*inside, "prompt_encoder.") if hasattr(model, "peft_config") else tuple(inside)
    return frozenset(fqn for fqn, _ in model.named_parameters() if f"{fqn}.".startswith(prefixes))


def _name_of(model: nn.Module) -> str:
    """The name or path that a model of transformers was loaded from; empty for others."""
    config = getattr(model, "config", None)
    name = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", "")
    return str(name or "")


def _refuse_without_values(model: nn.Module) -> None:
    for fqn, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{fqn} is sharded, so no rank has its values; save with save_training, or gather the "
                f"weights into a model that is not sharded"
            )
        if parameter.is_meta:
            raise ValueError(f"{fqn} is on the meta device and has no values; load the weights first")


def _refuse_other_folder(path: Path) -> None:
    """Refuse a folder, before any work, that is none or holds other files but no file of ours."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected a folder, and {path} is a file")
    others = (
        sorted(each.name for each in path.iterdir() if not each.match(_UNFINISHED)) if path.exists() else []
    )
    if others and FILE not in others:
        raise ValueError(
            f"{path} holds {some(others)} and no {FILE}; give a new folder, or one that save_trained wrote"
        )
    if FILE in others:
        _read_description(path / FILE)


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        for unfinished in path.glob(_UNFINISHED):
            unfinished.unlink()
        write_atomically(path / FILE, lambda file: save_file(dict(tensors), file, metadata))
    except (OSError, SafetensorError) as error:
        raise GTCompileError(
            f"the trained weights could not be written, and {path} holds what it held before: {error}"
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    description = _read_description(path)
    with safe_open(path, framework="pt") as file:
        return description, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no {path}; expected a folder that save_trained wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged, or was written by something else: {error}") from error
    if _KEY not in metadata:
        raise ValueError(f"{path} was not written by save_trained")
    description: dict[str, Any] = json.loads(metadata[_KEY])
    if description["version"] != 1:
        raise ValueError(f"{path} was written by a newer gtcompile; update gtcompile to load it")
    return description


def _fingerprints(tensors: Mapping[str, torch.Tensor]) -> dict[str, _Fingerprint]:
    """Read every tensor once, on several threads; a line of progress every few seconds."""
    total, done, said = sum(map(_bytes_in, tensors.values())), 0, time.monotonic()
    found = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for name, each in zip(tensors, threads.map(_fingerprint_of, tensors.values()), strict=True):
            found[name], done = each, done + _bytes_in(tensors[name])
            if time.monotonic() - said > _SECONDS:
                said = time.monotonic()
                logger.info("checksums of %.1f of %.1f GB of weights", done / 1e9, total / 1e9)
    return found


def _fingerprint_of(tensor: torch.Tensor) -> _Fingerprint:
    checksum = hashlib.blake2b(digest_size=16)
    for part in _plain_parts(tensor.detach()):
        flat = part.cpu().contiguous().view(-1)
        checksum.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return _Fingerprint(tuple(tensor.shape), str(tensor.dtype), checksum.hexdigest())


def _plain_parts(tensor: Any) -> Iterator[torch.Tensor]:
    """A plain tensor itself, and the tensors inside of one that wraps others, such as a quantized weight."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(tensor, name))
    else:
        yield tensor.as_subclass(torch.Tensor)


def _bytes_in(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
