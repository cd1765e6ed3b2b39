"""Split a batch of any structure into named tensors, and rebuild it around other tensors."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gtcompile.capture.model_io import tensors_of

Rebuild = Callable[[Mapping[str, torch.Tensor]], Any]
"""Takes tensors by name, and returns a batch of the same structure that contains them."""


def split_batch(batch: Any) -> tuple[dict[str, torch.Tensor], Rebuild]:
    """Split a batch into its tensors, by invented names, and a function that rebuilds it.

    Tensors are found in mappings, lists, tuples, dataclasses and attributes of other objects. Everything else
    is constant: every rebuilt batch contains the same objects.

    >>> tensors, rebuild = split_batch((torch.ones(2), {"mask": None, "y": torch.zeros(1)}))
    >>> list(tensors)
    ['batch_0', 'batch_1']
    >>> rebuild({"batch_0": 1, "batch_1": 2})
    (1, {'mask': None, 'y': 2})
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _rebuild(batch, tensors)


def _rebuild(value: Any, tensors: dict[str, torch.Tensor]) -> Rebuild:
    """Add the tensors of a value to `tensors`, each under one name, and return the value's `Rebuild`."""
    if isinstance(value, torch.Tensor):
        name = next((n for n, t in tensors.items() if t is value), f"batch_{len(tensors)}")
        tensors[name] = value
        return lambda new: new[name]
    if not tensors_of(value):
        return lambda new: value
    if type(value) in (list, tuple):
        return _sequence(type(value), [_rebuild(part, tensors) for part in value])
    if isinstance(value, tuple):  # a named tuple
        return _sequence(lambda parts: type(value)(*parts), [_rebuild(part, tensors) for part in value])
    if isinstance(value, Mapping):
        return _mapping(value, {key: _rebuild(part, tensors) for key, part in value.items()})
    return _object(value, {name: _rebuild(part, tensors) for name, part in vars(value).items()})


def _sequence(make: Callable[[list[Any]], Any], parts: list[Rebuild]) -> Rebuild:
    return lambda new: make([part(new) for part in parts])


def _mapping(given: Any, parts: dict[Any, Rebuild]) -> Rebuild:
    """Rebuild a mapping. A plain dictionary is constructed, which Dynamo can trace; others are copied."""
    if type(given) is dict:
        return lambda new: {key: part(new) for key, part in parts.items()}

    def run(new: Mapping[str, torch.Tensor]) -> Any:
        twin = copy.copy(given)
        for key, part in parts.items():
            twin[key] = part(new)
        return twin

    return run


def _object(given: Any, parts: dict[str, Rebuild]) -> Rebuild:
    """Rebuild an object. A dataclass is constructed, which Dynamo can trace; others are copied."""
    fields = dataclasses.fields(given) if dataclasses.is_dataclass(given) else ()
    if fields and all(field.init for field in fields) and {f.name for f in fields} == parts.keys():
        return lambda new: type(given)(**{name: part(new) for name, part in parts.items()})

    def run(new: Mapping[str, torch.Tensor]) -> Any:
        twin = copy.copy(given)
        for name, part in parts.items():
            object.__setattr__(twin, name, part(new))
        return twin

    return run
