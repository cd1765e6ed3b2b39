"""The frozen prefix of a model, computed once per example instead of once per epoch.

Blocks below the deepest trained parameter compute the same for an example in every epoch, until one of their
parameters changes. The cache keeps what leaves the last of them. A step whose examples are all known starts
from there, with the same loss and gradients.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gtcompile.capture.model_io import runs_as_one_region, unwrap
from gtcompile.compiler.blocks import find_blocks
from gtcompile.errors import GTCompileError
from gtcompile.graph.names import near_names
from gtcompile.state.trained_set import trained_parameters
from gtcompile.torch_internals import FakeTensor
from gtcompile.training.prefix_files import PrefixFiles, bytes_of, digest_of

logger = logging.getLogger(__name__)

NOT_READ_BY_BLOCKS = ("labels", "labelled_positions", "labelled_targets", "num_items_in_batch")
"""Arguments of a model that decide about its loss only, so that two examples may differ in them."""
_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Arguments with which transformers' models return what every block computed."""
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Greatest difference to a cached value, as a share of the greatest value, by dtype."""
_COARSE = 2e-2


@dataclass(slots=True)
class PrefixStats:
    """What a `PrefixCache` did."""

    hits: int = 0
    """Training steps that started from cached values."""
    misses: int = 0
    """Training steps that computed the frozen prefix and stored it."""
    bytes: int = 0
    """Size of the values stored now."""
    depth: int = 0
    """How many blocks a hit leaves out."""
    disabled: str | None = None
    """Why nothing is cached any more; None while the cache works."""


@dataclass(slots=True)
class _Store:
    """Outputs of block `depth - 1`, by example."""

    depth: int
    stamp: object
    rows: dict[bytes, torch.Tensor] = field(default_factory=dict)
    files: PrefixFiles | None = None
    verified: bool = False


class PrefixCache:
    """Keeps the outputs of the frozen blocks near the input, by example.

    It concerns forwards in training mode with gradients enabled; all others run as ever. What is frozen
    follows `train_only`, `AdaptiveBackprop` and the callback by itself, with any policy; policies that train
    one set between two selections profit. An optimizer step that changes a parameter of the prefix, or a load
    of other weights, empties the cache: it compares PyTorch's version counters of these parameters.
    `parameter.data.copy_` bypasses the counters; call `clear` after it.

    The first step that could start from cached values computes them again and compares. If they differ, as
    with dropout in the prefix, the cache is disabled with a warning, and training goes on without it.

    Examples are recognised by their contents: every tensor of the batch except the labels. So shuffling is
    fine; padding to another length makes another example.

    Args:
        model: any model whose forward takes tensors with one row per example, and whose repeated blocks run
            one after the other, each on the output of the one before. Call it after `get_peft_model`.
        blocks: FQNs of these blocks, in the order in which they run, if `compile_blocks` would find others.
            By default the first list of repeated blocks: of an encoder-decoder, the encoder.
        max_bytes: size of the values to keep in memory. Once it is reached, further examples are computed as
            before, or read from `folder`.
        device: the memory to keep them in.
        folder: a folder on disk for values, which later runs of the same model on the same examples use too,
            and several at once. Files are found by the contents of the frozen weights, of the example, and by
            the versions of torch and transformers. None keeps values in memory only.
        max_disk_bytes: size of all files in `folder`.
        ignored: names of the forward's arguments on which no block of the prefix depends.

    Raises:
        GTCompileError: the model is compiled as a whole, or has no repeated blocks.
        ValueError: a name in `blocks` is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        blocks: Sequence[str] | None = None,
        max_bytes: int = 2 << 30,
        device: torch.device | str = "cpu",
        folder: str | Path | None = None,
        max_disk_bytes: int = 16 << 30,
        ignored: Sequence[str] = NOT_READ_BY_BLOCKS,
    ) -> None:
        if runs_as_one_region(model):
            raise GTCompileError(
                "the model is compiled as a whole, so no block can be skipped; compile it with compile_blocks"
            )
        self._model = unwrap(model)
        self._names = _first_stack(self._model, blocks)
        self._blocks = [self._model.get_submodule(name) for name in self._names]
        self._folder, self._max_disk_bytes = None if folder is None else Path(folder), max_disk_bytes
        self._max_bytes, self._device, self._ignored = max_bytes, torch.device(device), frozenset(ignored)
        self._depths: dict[str, int] | None = None
        """By FQN of a parameter: how many blocks finish before the first module that owns it starts."""
        self._tuples: list[int] = []
        """For each block, the length of the tuple it returns; 0 where it returns a tensor."""
        self._store: _Store | None = None
        self._stack = contextlib.ExitStack()
        self._after: Callable[[], None] | None = None
        self.enabled = True
        """Set it to False to compute every block for a while; values are kept."""
        self.stats = PrefixStats()
        self._handles: list[RemovableHandle] = [
            self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self._model.register_forward_hook(self._after_forward),
        ]

    def remove(self) -> None:
        """Undo it: every forward computes every block again."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def clear(self) -> None:
        """Forget all values."""
        self._store, self.stats.bytes, self.stats.depth = None, 0, 0

    @contextlib.contextmanager
    def pretend_hit(self) -> Iterator[None]:
        """Inside, `backward_costs(model, batch)` returns the costs of a step that starts from cached values.

        They hold for sets that train nothing in the prefix of the set that is trained now.

        Raises:
            GTCompileError: no training forward has run yet, from which the order of the modules is known.
        """
        if self._depths is None:
            raise GTCompileError("run one training forward first: it shows in which order the modules run")
        enabled, self.enabled = self.enabled, False
        try:
            with contextlib.ExitStack() as stack:
                self._bypass(self._frozen_depth(), None, stack)
                yield
        finally:
            self.enabled = enabled

    # Hooks of the model.

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stack.close()  # a former forward may have raised
        self._after = None
        if self._is_concerned(module, args, kwargs):
            if self._depths is None:
                self._survey()
            elif depth := self._frozen_depth():
                self._look_up(depth, args, kwargs)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.close()
        after, self._after = self._after, None
        if after is not None:
            after()

    def _is_concerned(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if self.stats.disabled or not self.enabled or not module.training or not torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling() or any(map(kwargs.get, _RECORDED)):
            return False
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        return bool(tensors) and not any(isinstance(t, FakeTensor) or t.is_meta for t in tensors)

    # Which parameters belong to the prefix.

    def _survey(self) -> None:
        """In the next forward, note how many blocks have finished when each module is first called.

        Hooks inside of a block would make Dynamo capture it again; all of a block has one depth.
        """
        started: dict[str, int] = {}
        outputs: list[Any] = []

        def start(name: str) -> None:
            started.setdefault(name, len(outputs))

        def finish(block: nn.Module, args: Any, output: Any) -> None:
            outputs.append(len(output) if isinstance(output, tuple) else 0)
            if _hidden_of(output) is None or block is not self._blocks[len(outputs) - 1]:
                problems.append(type(block).__name__)

        problems: list[str] = []
        whole = frozenset((*find_blocks(self._model), *self._names))
        units = dict(_units(self._model, whole))
        for name, unit in units.items():
            hook = unit.register_forward_pre_hook(lambda *_, name=name: start(name))
            self._stack.callback(hook.remove)
        for block in self._blocks:
            self._stack.callback(block.register_forward_hook(finish).remove)

        def conclude() -> None:
            if problems or len(outputs) != len(self._blocks):
                self._disable(
                    "expected the blocks to run once each, in order, and to return one tensor; name others "
                    "with blocks=[...]"
                )
                return
            self._tuples = outputs
            depth_of: dict[nn.Parameter, int] = {}
            for name, unit in units.items():
                depth = started.get(name, 0)  # a module that was not called may be called the next time
                for parameter in unit.parameters(recurse=name in whole):
                    depth_of[parameter] = min(depth, depth_of.get(parameter, depth))
            named = self._model.named_parameters(remove_duplicate=False)
            self._depths = {name: depth_of[parameter] for name, parameter in named}

        self._after = conclude

    def _frozen_depth(self) -> int:
        """How many blocks finish before the first module with a trained parameter starts."""
        assert self._depths is not None
        trained = trained_parameters(self._model)
        return min((self._depths.get(name, 0) for name in trained), default=0)

    def _stamp(self, depth: int) -> object:
        """A value that changes when a parameter of the first `depth` blocks, or before them, does."""
        assert self._depths is not None
        parameters = self._model.named_parameters(remove_duplicate=False)
        return [(id(p), p._version) for name, p in parameters if self._depths.get(name, 0) < depth]

    # Looking up and storing.

    def _look_up(self, depth: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start from cached values if all examples have some; otherwise store what the forward computes."""
        store = self._current(depth)
        keys = self._keys(args, kwargs)
        found = [row for key in keys if (row := self._find(store, key)) is not None]
        if len(found) == len(keys) and store.verified:
            self.stats.hits += 1
            self._bypass(store.depth, torch.stack(found), self._stack)
            return
        self.stats.misses += 1
        output = self._watch(self._blocks[store.depth - 1])

        def conclude() -> None:
            hidden = output()
            if hidden is None or len(hidden) != len(keys):
                self._disable("the blocks return more than one tensor with a row for each example")
            elif len(found) == len(keys):
                self._verify(store, torch.stack(found), hidden)
            else:
                self._keep(store, keys, hidden)

        self._after = conclude

    def _current(self, depth: int) -> _Store:
        """The store for this depth, emptied if the depth or a parameter of the prefix has changed."""
        stamp = self._stamp(depth)
        if self._store is None or (self._store.depth, self._store.stamp) != (depth, stamp):
            self.clear()
            self._store, self.stats.depth = _Store(depth, stamp, files=self._files(depth)), depth
        return self._store

    def _files(self, depth: int) -> PrefixFiles | None:
        if self._folder is None:
            return None
        return PrefixFiles(self._folder, self._identity(depth), self._max_disk_bytes)

    def _identity(self, depth: int) -> Iterator[bytes]:
        """What decides the values of a prefix besides the example: code, configuration and weights."""
        assert self._depths is not None
        classes = [f"{type(m).__module__}.{type(m).__qualname__}" for m in self._model.modules()]
        yield repr((depth, torch.__version__, version("transformers"), classes)).encode()
        yield repr(getattr(self._model, "config", None)).encode()
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            if self._depths.get(name, 0) < depth:
                yield name.encode() + digest_of(tensor)

    def _find(self, store: _Store, key: bytes) -> torch.Tensor | None:
        """The values of an example, from memory or from disk."""
        if key in store.rows or store.files is None:
            return store.rows.get(key)
        row = store.files.read(key)
        if row is not None:
            row = row.to(self._device)
            self._remember(store, key, row)
        return row

    def _remember(self, store: _Store, key: bytes, row: torch.Tensor) -> None:
        if self.stats.bytes + row.nbytes <= self._max_bytes:
            store.rows[key] = row
            self.stats.bytes += row.nbytes

    def _keys(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[bytes]:
        """One digest per example, of everything that its row of the prefix can depend on."""
        inputs: dict[Any, Any] = dict(enumerate(args))
        inputs |= {name: value for name, value in kwargs.items() if name not in self._ignored}
        tensors = {k: v.detach().cpu() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        rows = max(len(t) for t in tensors.values() if t.dim())
        shared = {k: v for k, v in inputs.items() if k not in tensors}
        device = next(self._model.parameters()).device.type
        context = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        digests = [hashlib.blake2b(repr((shared, context)).encode(), digest_size=16) for _ in range(rows)]
        for key, tensor in tensors.items():
            by_row = tensor.dim() > 0 and len(tensor) == rows
            for row, digest in enumerate(digests):
                part = tensor[row] if by_row else tensor
                digest.update(repr((key, part.dtype, tuple(part.shape))).encode())
                digest.update(bytes_of(part))
        return [digest.digest() for digest in digests]

    def _keep(self, store: _Store, keys: Sequence[bytes], hidden: torch.Tensor) -> None:
        for key, row in zip(keys, hidden, strict=True):
            if key not in store.rows:
                kept = row.to(self._device, copy=True)
                self._remember(store, key, kept)
                if store.files is not None:
                    store.files.write(key, kept)

    def _verify(self, store: _Store, cached: torch.Tensor, hidden: torch.Tensor) -> None:
        cached = cached.to(hidden.device)
        allowed = _TOLERANCE.get(hidden.dtype, _COARSE)
        if torch.is_autocast_enabled(hidden.device.type):
            allowed = _COARSE
        difference = (cached - hidden).abs().max()
        if not difference <= allowed * hidden.abs().max():  # also when it is NaN
            self._disable("frozen blocks computed other values for the same example; do they have dropout?")
        store.verified = True

    def _disable(self, reason: str) -> None:
        self.clear()
        self.stats.disabled = reason
        logger.warning("the frozen prefix is not cached any more: %s", reason)

    # Blocks for the time of one forward.

    def _watch(self, block: nn.Module) -> Callable[[], torch.Tensor | None]:
        """Record what a block returns; the result is a function that tells it after the forward."""
        outputs: list[torch.Tensor | None] = []
        hook = block.register_forward_hook(lambda *call: outputs.append(_hidden_of(call[-1])))
        self._stack.callback(hook.remove)
        return lambda: outputs[0].detach() if outputs and outputs[0] is not None else None

    def _bypass(self, depth: int, cached: torch.Tensor | None, stack: contextlib.ExitStack) -> None:
        """Let all blocks but the last of the prefix return their input, and the last the cached values."""
        for index, block in enumerate(self._blocks[:depth]):
            value = cached if index == depth - 1 else None
            stack.enter_context(_replaced_forward(block, value, self._tuples[index]))


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
    """Let a block return its input, or the cached values, in a tuple of this length unless it is 0."""
    own = vars(block).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        output = hidden if cached is None else cached.to(hidden.device, non_blocking=True)
        return (output, *[None] * (length - 1)) if length else output

    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
