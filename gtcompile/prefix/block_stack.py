"""The repeated blocks of a model as a stack: what comes before each, and forwards that leave some out."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from gtcompile.compiler.blocks import find_blocks
from gtcompile.errors import GTCompileError
from gtcompile.graph.names import near_names
from gtcompile.state.trained_set import trained_parameters


class TensorVersions:
    """Tensors with their version counters; two are equal if no tensor was replaced or written to.

    It holds the tensors themselves, since the `id` of one that is gone may be given to another.
    """

    def __init__(self, versions: Sequence[tuple[torch.Tensor, int]]) -> None:
        self._versions = versions

    def equals(self, other: "TensorVersions") -> bool:
        """Whether both hold the same tensors at the same versions."""
        if len(self._versions) != len(other._versions):
            return False
        pairs = zip(self._versions, other._versions, strict=True)
        return all(own is its and version == its_version for (own, version), (its, its_version) in pairs)


class BlockStack:
    """Blocks that run one after the other, each on the output of the one before.

    A *prefix* of depth n is the first n blocks and all that runs before the last of them ends.

    Args:
        model: the model that contains them.
        names: FQNs of the blocks in the order in which they run; None takes the first list of repeated
            blocks, which is the encoder of an encoder-decoder.

    Raises:
        GTCompileError: the model has no repeated blocks.
        ValueError: a name is not a module.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None) -> None:
        self._model = model
        self.names = _first_stack(model, names)
        """FQNs of the blocks, in the order in which they run."""
        self._blocks = [model.get_submodule(name) for name in self.names]
        self._depths: dict[str, int] | None = None
        """By FQN of a parameter: how many blocks finish before the first module that owns it starts."""
        self._tuples: list[int] = []
        """For each block, the length of the tuple it returns; 0 where it returns a tensor."""
        self.precision: object = None
        """`autocast()` when the blocks last ran, since the model may enable it itself."""

    @property
    def surveyed(self) -> bool:
        """Whether a survey has found the order in which the modules run."""
        return self._depths is not None

    def survey(self, hooks: contextlib.ExitStack) -> Callable[[], str | None]:
        """In the next forward, note how many blocks have finished when each module is first called.

        Hooks inside of a block would make Dynamo capture it again; all of a block has one depth.

        Args:
            hooks: what to undo after that forward is added here.

        Returns:
            A function to be called after the forward; it returns what is wrong with these blocks, if
            anything is.
        """
        started: dict[str, int] = {}
        lengths: list[int] = []
        problems: list[str] = []

        def start(name: str) -> None:
            started.setdefault(name, len(lengths))

        def finish(block: nn.Module, args: Any, output: Any) -> None:
            lengths.append(len(output) if isinstance(output, tuple) else 0)
            self.precision = self.autocast()
            if _hidden_of(output) is None or block is not self._blocks[len(lengths) - 1]:
                problems.append(type(block).__name__)

        whole = frozenset((*find_blocks(self._model), *self.names))
        units = dict(_units(self._model, whole))
        for name, unit in units.items():
            hook = unit.register_forward_pre_hook(lambda *_, name=name: start(name))
            hooks.callback(hook.remove)
        for block in self._blocks:
            hooks.callback(block.register_forward_hook(finish).remove)

        def conclude() -> str | None:
            if problems or len(lengths) != len(self._blocks):
                return (
                    "expected the blocks to run once each, in order, and to return one tensor; name others "
                    "with blocks=[...]"
                )
            self._tuples = lengths
            self._depths = self._depths_from(started, units, whole)
            return None

        return conclude

    def depths(self) -> dict[str, int]:
        """By FQN of a parameter, the depth of the longest prefix that it is not part of."""
        depths = self._known_depths()
        return {name: depths[name] for name, _ in self._model.named_parameters() if name in depths}

    def frozen_depth(self) -> int:
        """Depth of the longest prefix in which nothing is trained."""
        depths = self._known_depths()
        return min((depths.get(name, 0) for name in trained_parameters(self._model)), default=0)

    def tensors(self, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers of the prefix of this depth, with every name they have."""
        depths = self._known_depths()
        return ((name, tensor) for name, tensor in self._all_tensors() if depths.get(name, 0) < depth)

    def versions(self, depth: int) -> TensorVersions:
        """Parameters and buffers of the prefix of this depth, as they are now."""
        return TensorVersions([(tensor, tensor._version) for _, tensor in self.tensors(depth)])

    def watch(self, depth: int, hooks: contextlib.ExitStack) -> Callable[[], torch.Tensor | None]:
        """In the next forward, record the output of the prefix of this depth.

        Args:
            depth: at least 1.
            hooks: what to undo after that forward is added here.

        Returns:
            A function that returns a copy of the output after the forward; None if there was no single
            tensor.
        """
        outputs: list[torch.Tensor | None] = []

        def record(_: nn.Module, args: Any, output: Any) -> None:
            hidden = _hidden_of(output)  # a copy, since the model may write to it
            outputs.append(None if hidden is None else hidden.detach().clone())
            self.precision = self.autocast()

        hooks.callback(self._blocks[depth - 1].register_forward_hook(record).remove)
        return lambda: outputs[0] if outputs else None

    def bypass(self, depth: int, cached: torch.Tensor | None, hooks: contextlib.ExitStack) -> None:
        """In the next forward, leave out the blocks of a prefix.

        All return NaN, except that the last one returns the cached values, if there are any.

        Args:
            depth: of the prefix.
            cached: its output.
            hooks: what to undo after that forward is added here.
        """
        for index, block in enumerate(self._blocks[:depth]):
            value = cached if index == depth - 1 else None
            hooks.enter_context(_replaced_forward(block, value, self._tuples[index]))

    def autocast(self) -> object:
        """The dtype of autocast on the model's device now; False without autocast."""
        device = next(self._model.parameters()).device.type
        return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)

    def _known_depths(self) -> dict[str, int]:
        if self._depths is None:
            raise GTCompileError("run one training forward first: it shows in which order the modules run")
        return self._depths

    def _all_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._model.named_parameters(remove_duplicate=False)
        yield from self._model.named_buffers(remove_duplicate=False)

    def _depths_from(
        self, started: dict[str, int], units: dict[str, nn.Module], whole: frozenset[str]
    ) -> dict[str, int]:
        """Depth of each tensor, by every name: the least of all modules that own it."""
        depth_of: dict[torch.Tensor, int] = {}
        for name, unit in units.items():
            depth = started.get(name, 0)  # a module that was not called may be called the next time
            inside = name in whole
            for tensor in (*unit.parameters(recurse=inside), *unit.buffers(recurse=inside)):
                depth_of[tensor] = min(depth, depth_of.get(tensor, depth))
        return {name: depth_of[tensor] for name, tensor in self._all_tensors()}


def _first_stack(model: nn.Module, blocks: Sequence[str] | None) -> tuple[str, ...]:
    names = tuple(find_blocks(model) if blocks is None else blocks)
    if not names:
        raise GTCompileError(f"{type(model).__name__} has no repeated blocks; name them with blocks=[...]")
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            near = near_names(name, known)
            raise ValueError(f"blocks: {type(model).__name__} has no module {name!r}; {near}")
    if blocks is not None:
        return names
    parent = names[0].rpartition(".")[0]
    return tuple(name for name in names if name.rpartition(".")[0] == parent)


def _units(model: nn.Module, whole: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    """Every module that is not inside of a block, by FQN."""
    for name, module in model.named_modules(remove_duplicate=False):
        parts = name.split(".")
        if not any(".".join(parts[:count]) in whole for count in range(1, len(parts))):
            yield name, module


def _hidden_of(output: Any) -> torch.Tensor | None:
    """The only tensor that a block returns, alone or first in a tuple; None if it returns more."""
    if isinstance(output, tuple) and output and all(other is None for other in output[1:]):
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


@contextlib.contextmanager
def _replaced_forward(block: nn.Module, cached: torch.Tensor | None, length: int) -> Iterator[None]:
    """Let a block return NaN, or the cached values, in a tuple of this length unless it is 0."""
    own = vars(block).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        if cached is None:
            output = torch.full_like(hidden, torch.nan, requires_grad=False)
        else:
            output = cached.to(hidden.device, non_blocking=True)
        return (output, *[None] * (length - 1)) if length else output

    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
