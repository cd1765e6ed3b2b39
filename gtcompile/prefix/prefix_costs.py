"""What a prefix cache saves, in FLOPs: of a step to come, and on average over the steps so far."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn

from gtcompile.capture.model_io import unwrap
from gtcompile.prefix.prefix_cache import COMPARED, PrefixCache
from gtcompile.selection.cached_prefix import CachedPrefix


def prefix_cache_of(model: nn.Module, given: "PrefixCache | bool | str | Path") -> PrefixCache | None:
    """Return the cache that a user asked for.

    Args:
        model: the model that is trained.
        given: a cache, True for one in memory, a folder for one that is also on disk, False for none.

    Raises:
        TypeError: something else was given.
        ValueError: the cache is of another model, or nothing can be written to the folder.
        GTCompileError: the model has no repeated blocks, or is compiled as a whole.
    """
    if isinstance(given, PrefixCache):
        if given.model is not unwrap(model):
            raise ValueError("prefix_cache: this cache was made for another model; make one for this model")
        return given
    if isinstance(given, str | Path):
        return PrefixCache(model, folder=given)
    if not isinstance(given, bool):
        raise TypeError(f"expected prefix_cache=True, a folder or a PrefixCache, got {given!r}")
    return PrefixCache(model) if given else None


@dataclass(frozen=True, slots=True)
class Outlook:
    """What can be expected of a cache in an epoch like the last one."""

    held: int
    """How many blocks it holds for all examples."""
    hits: Fraction
    """Share of the steps that start from it, if these blocks stay unchanged."""
    later_hits: Fraction
    """The same of an epoch after it has been filled anew."""

    def of(self, depths: Mapping[str, int], block_flops: Sequence[int], epochs: int) -> CachedPrefix:
        """Return it with the costs of blocks, for so many epochs."""
        return CachedPrefix(
            depths=depths,
            block_flops=tuple(block_flops),
            epochs=epochs,
            held=self.held,
            hits=self.hits,
            later_hits=self.later_hits,
        )


class PrefixCosts:
    """Counts what training forwards, with their backwards, really compute.

    Args:
        cache: of the model that is trained.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self.block_flops: tuple[int, ...] = ()
        """FLOPs of the forward of each block, in order; empty while they are unknown, and then a step that
        leaves blocks out counts in full."""
        self._seen = Counter(cache.stats.forwards)
        self._taken = self._whole = 0
        self._window: Counter[int] = Counter()
        """Training forwards since the last selection, by how many blocks they left out."""
        self._all_here = True
        """Whether all of them ran on this cache; not if a state was loaded after some."""
        self._steps = 0
        """Steps of the optimizer since the last selection, as far as they are known."""
        self._promised, self._uses, self._charged = 0, 0, 0

    def cached_step_flops(self, step_flops: int, block_flops: Sequence[int] | None = None) -> int:
        """FLOPs of a step that starts from cached values.

        Args:
            step_flops: of a step that computes everything.
            block_flops: of each block at the same shapes; None for those that are kept here.
        """
        blocks = self.block_flops if block_flops is None else block_flops
        return step_flops - sum(blocks[: self.cache.reachable_depth])

    def outlook(self) -> Outlook:
        """What an epoch can expect that has the batches of the forwards since the last selection."""
        forwards = self._window.total()
        held = self.cache.held_blocks(forwards) if forwards and self._all_here else 0
        return Outlook(
            held, self._hits(self.cache.uses, forwards) if held else Fraction(0), self._hits(0, forwards)
        )

    def _hits(self, uses: int, forwards: int) -> Fraction:
        """Share of the steps of an epoch that are not computed again to be compared."""
        misses = Fraction(self.cache.comparisons(uses, forwards), forwards or 1)
        return 1 - max(misses, Fraction(1, COMPARED))

    def begin(self, block_flops: Sequence[int], kept_blocks: int | None, *, promised: bool) -> None:
        """Start an epoch after a selection.

        Args:
            block_flops: of the mean step.
            kept_blocks: as for `PrefixCache.keep`.
            promised: whether the selection relies on all examples being found.
        """
        self.block_flops, self._window, self._all_here = tuple(block_flops), Counter(), True
        self._steps, self._uses, self._charged = 0, self.cache.uses, 0
        self._keep(kept_blocks, promised=promised)

    def resume(self, state: Mapping[str, Any], kept_blocks: int | None, *, promised: bool) -> None:
        """Go on in an epoch whose forwards so far may have run on another cache.

        Args:
            state: as `state` returned it; empty if it is of a training without a cache.
            kept_blocks: as for `PrefixCache.keep`.
            promised: whether the selection of the epoch relies on all examples being found.
        """
        self.block_flops = tuple(state.get("block_flops", ()))
        self._taken, self._whole = state.get("taken", 0), state.get("whole", 0)
        self._window = Counter(dict(state.get("forwards", ())))
        self._all_here = "forwards" in state and not self._window
        self._steps, self._uses, self._charged = (state.get(key, 0) for key in ("steps", "uses", "charged"))
        self._keep(kept_blocks, promised=promised)

    def _keep(self, blocks: int | None, *, promised: bool) -> None:
        self.cache.keep(blocks)
        self._promised = (blocks or 0) if promised else 0

    def unforeseen_flops(self) -> int:
        """FLOPs that steps since the last selection took because examples were not found.

        To be called once after each step of the optimizer. Each FLOP is returned once. A state that does not
        tell the forwards of its epoch counts from when it was loaded.
        """
        forwards = self._window.total()
        if not forwards:
            return 0
        self._steps += 1
        found = sum(count for depth, count in self._window.items() if depth >= self._promised)
        missed = forwards - found - self.cache.comparisons(self._uses, forwards)
        owed = max(missed, 0) * sum(self.block_flops[: self._promised]) * self._steps // forwards
        new = max(owed - self._charged, 0)
        self._charged += new
        return new

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards within the block are no training: they neither count nor use the cache."""
        before = Counter(self.cache.stats.forwards)
        try:
            with self.cache.paused():
                yield
        finally:
            self._seen += self.cache.stats.forwards - before

    def survey(self, run: Callable[[], object]) -> None:
        """Run a training forward if none has shown the order of the modules, on which costs depend."""
        if not self.cache.surveyed:
            enabled, self.cache.enabled = self.cache.enabled, True
            try:
                run()
            finally:
                self.cache.enabled = enabled

    def count(self, step_flops: int, whole_flops: int, block_flops: Sequence[int] | None = None) -> None:
        """Count the forwards since the last call.

        Args:
            step_flops: FLOPs of a whole step with the set that all of them trained.
            whole_flops: FLOPs that the shares are of; 0 counts nothing.
            block_flops: of each block at the shapes of these forwards; None for those that are kept here.
        """
        blocks = self.block_flops if block_flops is None else block_flops
        new, self._seen = self.cache.stats.forwards - self._seen, Counter(self.cache.stats.forwards)
        self._window += new
        for depth, forwards in new.items() if whole_flops else ():
            self._whole += forwards * whole_flops
            self._taken += forwards * (step_flops - sum(blocks[:depth]))

    @property
    def mean_fraction(self) -> float:
        """Share of FLOPs that the counted forwards took, of all of them together; 0.0 before the first."""
        return self._taken / self._whole if self._whole else 0.0

    def state(self) -> dict[str, Any]:
        """What `resume` needs, as JSON types."""
        return {
            "block_flops": list(self.block_flops),
            "taken": self._taken,
            "whole": self._whole,
            "forwards": [[depth, forwards] for depth, forwards in sorted(self._window.items())],
            "steps": self._steps,
            "uses": self._uses,
            "charged": self._charged,
        }
