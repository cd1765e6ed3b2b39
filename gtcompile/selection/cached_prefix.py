"""What a prefix cache saves, as numbers and names: the forward of the blocks near the input."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPrefix:
    """A prefix cache at a selection, and what it can save until the end of the training.

    A cache *keeps* the first n blocks: it holds what leaves the last of them, and steps that train nothing in
    them leave out their forward, once the cache holds the values of all examples.
    """

    depths: Mapping[str, int]
    """By FQN, the most blocks that can be kept while this parameter is trained."""
    block_flops: tuple[int, ...]
    """FLOPs of the forward of each block, in order."""
    epochs: int
    """Selections that are still to come, this one included, each for one epoch."""
    held: int = 0
    """Number of blocks of which the cache holds the values of all examples now."""
    hits: Fraction = Fraction(0)
    """Share of the coming epoch's steps that leave these blocks out, if they stay unchanged."""
    later_hits: Fraction = Fraction(1)
    """The same of the epochs after it, if the cache is filled in the coming one."""

    def saved_flops(self, blocks: int) -> int:
        """FLOPs that a step saves by leaving out so many blocks."""
        return sum(self.block_flops[:blocks])

    def inside(self, blocks: int) -> frozenset[str]:
        """FQNs that cannot be trained while so many blocks are kept."""
        return frozenset(fqn for fqn, depth in self.depths.items() if depth < blocks)

    def most_blocks(self, trained: frozenset[str]) -> int:
        """How many blocks can be kept while these parameters are trained."""
        return min((self.depths[fqn] for fqn in trained), default=len(self.block_flops))
