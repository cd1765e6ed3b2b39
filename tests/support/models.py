"""Small models and Hypothesis strategies that several test modules share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from gtcompile.capture.model_io import loss_of
from gtcompile.graph.flops import count_flops
from gtcompile.torch_internals import dynamo_counters

WIDTH, LENGTH, BATCH = 8, 6, 2


class ResidualMLP(nn.Module):
    """x + W2 gelu(W1 x)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Branches(nn.Module):
    """Two parallel paths of different cost that meet again, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH, bias=False), ResidualMLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.left(x)) * self.right(x)


class Norm(nn.Module):
    """Layer norm and what follows it in most models."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


class Convolution(nn.Module):
    """A convolution over the sequence and batch norm, in training mode a mutation of buffers.

    Contiguous again at the end: on other strides eager `linear` picks its kernel by `requires_grad` (as SDPA
    does for a mask that asks for a gradient), so that freezing changes the last bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.conv(x.transpose(1, 2))))
        return x + features.transpose(1, 2).contiguous()


class Dropped(nn.Module):
    """A linear layer and dropout, which draws random numbers."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(probability)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.linear(x))


class Attention(nn.Module):
    """A pre-norm transformer block, causal attention through SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.mlp = nn.Linear(WIDTH, WIDTH), ResidualMLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        return self.mlp(x + self.out(mixed.transpose(1, 2).flatten(2)))


class PartlyUnused(nn.Module):
    """Has a parameter that no output depends on, and one that its author froze."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.never_called = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH,), 1.5), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.linear(x)) * self.scale


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "residual": ResidualMLP,
    "branches": Branches,
    "norm": Norm,
    "convolution": Convolution,
    "no dropout": lambda: Dropped(0.0),
    "dropout": lambda: Dropped(0.3),
    "attention": Attention,
    "partly unused": PartlyUnused,
}
"""What random models are made of; each maps (batch, length, width) to the same shape."""
RANDOM_LAYERS = frozenset({"dropout"})
"""Those that draw random numbers, which Inductor draws in another order than eager PyTorch."""


class Stack(nn.Module):
    """Layers in a row between an embedding and a head, and the mean squared error as loss."""

    def __init__(self, layers: list[nn.Module], *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, WIDTH)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return ((self.head(x) - y) ** 2).mean()


class Regression(nn.Module):
    """A multi-layer perceptron with tanh between its layers, and the mean squared error as loss."""

    def __init__(self, depth: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return ((x - y) ** 2).mean()


@dataclass(frozen=True)
class Recipe:
    """How to make a model and a batch; prints well when Hypothesis finds it guilty."""

    layers: tuple[str, ...]
    tied: bool = False
    shared: bool = False
    """Whether the first layer runs again at the end."""
    seed: int = 0

    def model(self) -> Stack:
        """A new model; the same recipe makes the same weights, whatever random state it finds and leaves."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            layers = [LAYERS[name]() for name in self.layers]
            return Stack(layers + layers[:1] * self.shared, tied=self.tied)

    def batch(self) -> dict[str, Any]:
        """Keyword dictionary of the model's forward."""
        return make_batch(self.seed)


def make_batch(seed: int = 0, *shape: int) -> dict[str, torch.Tensor]:
    """Inputs and targets, by default (batch, length, width)."""
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (BATCH, LENGTH, WIDTH)
    return {name: torch.randn(*shape, generator=generator) for name in ("x", "y")}


def recipes(*, layers: int = 4, without: frozenset[str] = frozenset()) -> st.SearchStrategy[Recipe]:
    """Random models of up to so many layers."""
    names = st.sampled_from(sorted(LAYERS.keys() - without))
    return st.builds(
        Recipe,
        layers=st.lists(names, min_size=1, max_size=layers).map(tuple),
        tied=st.booleans(),
        shared=st.booleans(),
        seed=st.integers(0, 99),
    )


POOL = (
    Recipe(("residual", "attention", "norm")),
    Recipe(("branches", "no dropout", "branches"), tied=True),
    Recipe(("convolution", "residual"), shared=True),
    Recipe(("norm", "convolution", "partly unused"), tied=True),
    Recipe(("attention", "dropout", "attention")),
    Recipe(("partly unused", "branches"), shared=True),
    Recipe(("dropout", "norm", "residual"), tied=True, shared=True),
)
"""Models for properties of graphs, where a capture costs much and another trained set little."""


def block_recipes(without: frozenset[str] = frozenset()) -> st.SearchStrategy[Recipe]:
    """Random models whose layers repeat, as `compile_blocks` wants them."""
    names = st.sampled_from(sorted(LAYERS.keys() - without))
    layers = st.lists(names, min_size=1, max_size=2).map(lambda kinds: (*kinds, *kinds))
    return st.builds(Recipe, layers=layers, tied=st.booleans(), seed=st.integers(0, 99))


def selectable(model: nn.Module) -> list[str]:
    """First names of the parameters that ask for a gradient, whether or not the loss depends on them."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def trained_sets(names: list[str]) -> st.SearchStrategy[frozenset[str]]:
    """Non-empty sets of these names; a few, a run of neighbours, or any."""
    run = st.tuples(st.sampled_from(range(len(names))), st.integers(1, len(names)))
    runs = run.map(lambda ends: frozenset(names[ends[0] : ends[0] + ends[1]]))
    return st.one_of(runs, st.frozensets(st.sampled_from(names), min_size=1))


def random_sets(names: list[str], count: int, seed: int = 0) -> list[frozenset[str]]:
    """So many different non-empty random sets, sizes spread evenly."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[frozenset[str], None] = {}
    while len(found) < count:
        size = int(torch.randint(1, len(names) + 1, (), generator=generator))
        order = torch.randperm(len(names), generator=generator).tolist()
        found[frozenset(names[i] for i in order[:size])] = None
    return list(found)


def step(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """One forward and backward, gradients cleared before; the loss."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model(**batch))
    loss.backward()
    return loss.detach()


def counted_step(model: nn.Module, batch: dict[str, Any]) -> int:
    """FLOPs that one forward and backward really take, gradients cleared before."""
    with count_flops() as counter:
        step(model, batch)
    return counter.get_total_flops()


def forget_captures() -> None:
    """Dynamo as in a fresh process."""
    torch.compiler.reset()
    dynamo_counters.clear()


def captures() -> int:
    """How many graphs Dynamo captured since `forget_captures`."""
    return int(dynamo_counters["stats"]["unique_graphs"])
