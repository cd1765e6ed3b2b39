"""The frozen prefix of a model, computed once per example instead of once per epoch.

Blocks below the deepest trained parameter compute the same for an example in every epoch, until one of their
parameters changes. The cache keeps what leaves the last of them. A step whose examples are all known starts
from there, with the same loss and gradients.
"""

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gtcompile.capture.model_io import runs_as_one_region, tensors_of, unwrap
from gtcompile.errors import GTCompileError
from gtcompile.prefix.block_stack import BlockStack, TensorVersions
from gtcompile.prefix.prefix_files import PrefixFiles, bytes_of, digest_of, writable_folder
from gtcompile.torch_internals import FakeTensor

logger = logging.getLogger(__name__)

NOT_READ_BY_BLOCKS = ("labelled_positions", "labelled_targets", "num_items_in_batch")
"""Arguments of a model that describe a whole batch and are read by its head or loss only."""
_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Arguments with which transformers' models return what every block computed."""
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Greatest median difference to cached values, as a share of the median value, by dtype."""
_COARSE = 2e-2
"""The same under autocast and for other dtypes."""
COMPARED, _FIRST_HIT = 64, 2
"""The first of every 64 steps that find their examples is computed again and compared; the second of all is
the first that leaves blocks out, and its results are checked for NaN."""
_PLAIN = (bool, int, float, str, torch.dtype)


@dataclass(slots=True)
class PrefixStats:
    """What a `PrefixCache` did."""

    hits: int = 0
    """Training steps that started from cached values."""
    misses: int = 0
    """Training steps that computed the frozen prefix and stored it."""
    forwards: Counter[int] = field(default_factory=Counter)
    """All training forwards by how many blocks they left out: 0 for those that computed every block."""
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
    versions: TensorVersions
    rows: dict[bytes, torch.Tensor] = field(default_factory=dict)
    files: PrefixFiles | None = None
    lookups: int = 0
    """How often a step looked for its examples here."""
    uses: int = 0
    """How often a step found all of its examples here."""
    overflowed: bool = False
    """Whether an example was left out, because there was no room."""


class PrefixCache:
    """Keeps the outputs of the frozen blocks near the input, by example.

    It concerns forwards in training mode with gradients enabled; all others run as ever. What is frozen
    follows `train_only`, `AdaptiveBackprop` and the callback by itself, with any policy; policies that train
    one set between two selections profit. An optimizer step that changes a parameter or buffer of the prefix,
    or a load of other weights, empties the cache: it compares PyTorch's version counters of these tensors.
    Writes through `parameter.data` bypass the counters, and so do changes of a module, such as another active
    adapter: call `clear` after these.

    The first step that could start from cached values, and every 64th, computes them again and compares. If
    they differ, as with dropout in the prefix, the cache is disabled with a warning, and training goes on
    without it. While blocks are left out, they return NaN, so that a model which reads them elsewhere cannot
    train on wrong values; this is an error.

    Examples are recognised by their contents: their rows of every tensor of the batch. So shuffling is fine;
    padding to another length makes another example. Batches with other arguments than tensors, numbers and
    strings, or with an input that requires grad, are computed as ever.

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
        max_disk_bytes: size of all such files in `folder`. Other files and folders in it are neither counted
            nor deleted.
        ignored: names of the forward's arguments on which no block of the prefix depends.

    Raises:
        GTCompileError: the model is compiled as a whole, or has no repeated blocks.
        ValueError: a name in `blocks` is not a module, or nothing can be written to `folder`.
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
        self.model = unwrap(model)
        """The model, without wrappers of parallel training."""
        self._blocks = BlockStack(self.model, blocks)
        self._folder = None if folder is None else writable_folder(Path(folder))
        self._max_disk_bytes = max_disk_bytes
        self._max_bytes, self._device, self._ignored = max_bytes, torch.device(device), frozenset(ignored)
        configs = [getattr(module, "config", None) for module in self.model.modules()]
        self._configs = list({id(c): c for c in configs if c is not None}.values())
        self._store: _Store | None = None
        self._hooks = contextlib.ExitStack()
        """Undoes what was done for the present forward."""
        self._after: Callable[[], None] | None = None
        self._after_hit = False
        self._most_blocks: int | None = None
        self.enabled = True
        """Set it to False to compute every block for a while; values are kept."""
        self.stats = PrefixStats()
        self._handles: list[RemovableHandle] = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
        ]

    @property
    def most_bytes(self) -> int:
        """Size of the values that it may keep in memory."""
        return self._max_bytes

    @property
    def device(self) -> torch.device:
        """The memory that it keeps them in."""
        return self._device

    @property
    def blocks(self) -> tuple[str, ...]:
        """FQNs of the blocks that may be left out, in the order in which they run."""
        return self._blocks.names

    @property
    def surveyed(self) -> bool:
        """Whether a training forward has shown in which order the modules run; until then all is computed."""
        return self._blocks.surveyed

    @property
    def reachable_depth(self) -> int:
        """How many blocks a step leaves out, with the present trained set, if its examples are cached."""
        usable = self.surveyed and self.enabled and not self.stats.disabled
        return self._depth_of_a_hit() if usable else 0

    def depths(self) -> dict[str, int]:
        """By FQN of a parameter, how many blocks a step can leave out at most if it trains this one.

        Raises:
            GTCompileError: no training forward has run yet, from which the order of the modules is known.
        """
        return self._blocks.depths()

    def held_blocks(self, forwards: int) -> int:
        """How many blocks are left out by steps whose examples are those of the latest training forwards.

        0 if the values of some of these examples are not kept, or are of other weights.

        Args:
            forwards: how many of the latest ones; all of them must have run on this cache, not before a state
                was loaded.
        """
        store = self._store
        if store is None or store.lookups < forwards or store.overflowed or not self.enabled:
            return 0
        return store.depth if store.versions.equals(self._blocks.versions(store.depth)) else 0

    def comparisons(self, first: int, steps: int) -> int:
        """How many steps are computed again and compared, of so many that find their examples.

        Args:
            first: how many steps have found theirs before.
            steps: that will.
        """
        return (first + steps + COMPARED - 1) // COMPARED - (first + COMPARED - 1) // COMPARED

    @property
    def uses(self) -> int:
        """How many steps have found all of their examples among the present values."""
        return self._store.uses if self._store else 0

    def keep(self, blocks: int | None) -> None:
        """Store what leaves this block from now on, even if more blocks are frozen, and never more.

        Values of another block are forgotten.

        Args:
            blocks: the number of blocks that steps leave out; None for all that are frozen.
        """
        self._most_blocks = blocks
        if self._store is not None and blocks not in (None, self._store.depth):
            self.clear()

    def remove(self) -> None:
        """Undo it: every forward computes every block again."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def clear(self) -> None:
        """Forget all values."""
        self._store, self.stats.bytes, self.stats.depth = None, 0, 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, every block is computed and nothing is stored; values stay.

        What is done inside must leave the parameters and buffers of the prefix with the contents they had.
        """
        store, enabled = self._store, self.enabled
        valid = store is not None and store.versions.equals(self._blocks.versions(store.depth))
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = enabled
            if store is not None and valid:  # restoring a buffer's contents raises its version
                store.versions = self._blocks.versions(store.depth)

    @contextlib.contextmanager
    def pretend_hit(self) -> Iterator[None]:
        """Inside, `backward_costs(model, batch)` returns the costs of a step that starts from cached values.

        They hold for sets that train nothing in the prefix of the set that is trained now.

        Raises:
            GTCompileError: no training forward has run yet, from which the order of the modules is known.
        """
        depth = self._depth_of_a_hit()
        with self.paused(), contextlib.ExitStack() as hooks:
            self._blocks.bypass(depth, None, hooks)
            yield

    # Hooks of the model.

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hooks.close()  # a former forward may have raised
        self._after, self._after_hit = None, False
        skipped = 0
        if self._is_concerned(module, args, kwargs):
            if not self._blocks.surveyed:
                self._after = self._survey()
            elif depth := self._frozen_depth():
                skipped = self._look_up(depth, args, kwargs)
        if _trains(module, self._inputs(args, kwargs).values()):
            self.stats.forwards[skipped] += 1

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hooks.close()
        after, self._after = self._after, None
        first, self._after_hit = self._after_hit, False
        if first and any(t.is_floating_point() and t.isnan().any() for t in tensors_of(output)):
            self._disable("the model reads blocks of the frozen prefix elsewhere than in the next block")
            raise GTCompileError(
                f"PrefixCache: {self.stats.disabled}, so this step has no right loss. Nothing has changed; "
                f"train without the cache, or name the blocks that only the next one reads with blocks=[...]"
            )
        if after is not None and output is not None:
            after()

    def _is_concerned(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if self.stats.disabled or not self.enabled:
            return False
        if any(kwargs.get(name) for name in _RECORDED):
            return False
        if any(getattr(config, name, False) for config in self._configs for name in _RECORDED):
            return False
        inputs = self._inputs(args, kwargs).values()
        if not _trains(module, inputs):
            return False
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        if any(tensor.requires_grad for tensor in tensors):
            return False
        known = all(value is None or isinstance(value, (torch.Tensor, *_PLAIN)) for value in inputs)
        return known and any(tensor.dim() for tensor in tensors)

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Any, Any]:
        """The arguments that blocks may depend on, by position or name."""
        named = {name: value for name, value in kwargs.items() if name not in self._ignored}
        return {**dict(enumerate(args)), **named}

    def _survey(self) -> Callable[[], None]:
        conclude = self._blocks.survey(self._hooks)

        def disable_if_wrong() -> None:
            if problem := conclude():
                self._disable(problem)

        return disable_if_wrong

    # Looking up and storing.

    def _look_up(self, depth: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Start from cached values if all examples have some; otherwise store what the forward computes.

        Returns:
            How many blocks are left out.
        """
        store = self._current(depth)
        store.lookups += 1
        keys = self._keys(args, kwargs)
        found = [row for key in keys if (row := self._find(store, key)) is not None]
        complete = len(found) == len(keys)
        store.uses += complete
        if complete and store.uses % COMPARED != 1:
            self.stats.hits += 1
            self._blocks.bypass(store.depth, torch.stack(found), self._hooks)
            self._after_hit = store.uses == _FIRST_HIT
            return store.depth
        self.stats.misses += 1
        output = self._blocks.watch(store.depth, self._hooks)

        def conclude() -> None:
            hidden = output()
            if hidden is None or len(hidden) != len(keys):
                self._disable("the blocks return more than one tensor with a row for each example")
            elif complete:
                self._compare(torch.stack(found), hidden)
            else:
                self._keep(store, keys, hidden)

        self._after = conclude
        return 0

    def _frozen_depth(self) -> int:
        depth = self._blocks.frozen_depth()
        return depth if self._most_blocks is None else min(depth, self._most_blocks)

    def _depth_of_a_hit(self) -> int:
        depth = self._frozen_depth()
        return depth if self._store is None else min(depth, self._store.depth)

    def _current(self, depth: int) -> _Store:
        """The store for this depth or a smaller one, emptied if its prefix has changed or became shorter.

        If the frozen prefix became longer, the values stay: to fill a new store costs a whole epoch.
        """
        store = self._store
        if (
            store is None
            or store.depth > depth
            or not store.versions.equals(self._blocks.versions(store.depth))
        ):
            self.clear()
            store = _Store(depth, self._blocks.versions(depth), files=self._files(depth))
            self._store, self.stats.depth = store, depth
        return store

    def _files(self, depth: int) -> PrefixFiles | None:
        if self._folder is None:
            return None
        return PrefixFiles(self._folder, self._identity(depth), self._max_disk_bytes)

    def _identity(self, depth: int) -> Iterator[bytes]:
        """What decides the values of a prefix besides the example: code, configuration and weights."""
        classes = [f"{type(m).__module__}.{type(m).__qualname__}" for m in self.model.modules()]
        yield repr((depth, torch.__version__, version("transformers"), classes)).encode()
        yield repr(getattr(self.model, "config", None)).encode()
        yield repr(self._blocks.precision).encode()
        for name, tensor in self._blocks.tensors(depth):
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
        elif store.files is None:
            store.overflowed = True

    def _keys(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[bytes]:
        """One digest per example, of everything that its row of the prefix can depend on."""
        inputs = self._inputs(args, kwargs)
        tensors = {k: v.detach().cpu() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        rows = max(len(t) for t in tensors.values() if t.dim())
        shared = {k: v for k, v in inputs.items() if k not in tensors}
        digests = [hashlib.blake2b(repr((shared, self._blocks.autocast())).encode(), digest_size=16)]
        digests += [digests[0].copy() for _ in range(rows - 1)]
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

    def _compare(self, cached: torch.Tensor, hidden: torch.Tensor) -> None:
        """Disable the cache if values differ; by medians, since a few values in a model are huge."""
        difference = (cached.to(hidden.device) - hidden).abs().float().median()
        allowed = _COARSE if self._blocks.precision else _TOLERANCE.get(hidden.dtype, _COARSE)
        if not difference <= allowed * hidden.abs().float().median():  # also when it is NaN
            self._disable("frozen blocks computed other values for the same example; do they have dropout?")

    def _disable(self, reason: str) -> None:
        self.clear()
        self.stats.disabled = reason
        logger.warning("the frozen prefix is not cached any more: %s", reason)


def _trains(module: nn.Module, inputs: Iterable[Any]) -> bool:
    """Whether a forward is one of training, on tensors that have values."""
    if not module.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not any(isinstance(t, torch.Tensor) and (isinstance(t, FakeTensor) or t.is_meta) for t in inputs)
