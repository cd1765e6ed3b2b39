"""Check that saved state belongs to this model, before anything is loaded."""

from collections.abc import Mapping, Sequence

import torch

from gtcompile.errors import some

Shapes = Mapping[str, Sequence[int] | None]
"""Shapes by name; None for a value that is not a tensor."""


def shapes_of(state: Mapping[str, object]) -> dict[str, list[int] | None]:
    """Return the shapes of the tensors in a state dictionary."""
    return {name: list(v.shape) if isinstance(v, torch.Tensor) else None for name, v in state.items()}


def check_same_model(saved: Shapes, present: Shapes, what: str) -> None:
    """Refuse a state whose names or shapes differ from those of the model.

    Args:
        saved: shapes in the state.
        present: shapes in the model.
        what: the state as the subject of the message, such as "checkpoint.pt is a checkpoint".

    Raises:
        ValueError: names or shapes differ; the message lists the first.
    """
    differing = [
        f"{name} was {_shape(saved, name)} when saved and is {_shape(present, name)} now"
        for name in sorted(saved.keys() | present.keys())
        if _shape(saved, name) != _shape(present, name)
    ]
    if differing:
        raise ValueError(f"{what} of another model: {some(differing, '; ')}")


def _shape(shapes: Shapes, name: str) -> str:
    if name not in shapes:
        return "absent"
    shape = shapes[name]
    return "no tensor" if shape is None else str(list(shape))
