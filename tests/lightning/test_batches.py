"""Batches drawn from Lightning's loaders: which examples, and what is left as it was."""

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from gtcompile.lightning.batches import _draw
from tests.support.lightning import QUIET, Module, Witness, adaptive, fit, make_data, make_loader

pytestmark = QUIET
NUMBERS = list(range(40))


def drawn(loader, count=3, seed="0 0 0"):
    return [batch.tolist() for batch in _draw(loader, count, seed)]


def test_examples_are_drawn_by_seed_alone():
    loader = DataLoader(NUMBERS, batch_size=4, shuffle=True)
    first = drawn(loader)
    assert [len(batch) for batch in first] == [4, 4, 4]
    assert drawn(loader) == first != drawn(loader, seed="0 1 0")


SAMPLERS = {
    "subset": lambda generator: SubsetRandomSampler(range(10), generator),
    "weighted": lambda generator: WeightedRandomSampler([1.0] * 10 + [0.0] * 30, 40, generator=generator),
    "wrapped": lambda generator: BatchSampler(SubsetRandomSampler(range(10), generator), 4, drop_last=False),
}


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("own", [False, True])
def test_a_sampler_that_excludes_examples_is_obeyed_reseeded_and_left_as_it_was(kind, own):
    generator = torch.Generator().manual_seed(3)
    sampler = SAMPLERS[kind](generator if own else None)
    how = {"batch_sampler": sampler} if kind == "wrapped" else {"batch_size": 4, "sampler": sampler}
    loader = DataLoader(NUMBERS, **how)
    states = torch.get_rng_state(), generator.get_state()
    batches = drawn(loader, count=2)
    assert all(number < 10 for batch in batches for number in batch)
    assert drawn(loader, count=2) == batches != drawn(loader, count=2, seed="0 5 0")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state(), states[1])


def test_a_batch_sampler_says_how_large_batches_are():
    sampler = BatchSampler(RandomSampler(NUMBERS), batch_size=5, drop_last=True)
    assert [len(batch) for batch in drawn(DataLoader(NUMBERS, batch_sampler=sampler))] == [5, 5, 5]
    pairs = [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="list has none, so the size of the batches"):
        drawn(DataLoader(NUMBERS, batch_sampler=pairs))


def test_a_data_set_of_whole_batches_is_taken_as_it_is():
    data = [torch.full((2,), number) for number in NUMBERS]
    batches = list(_draw(DataLoader(data, batch_size=None), 3, "0"))
    assert len(batches) == 3
    assert all(len(batch) == 2 for batch in batches)


def test_several_loaders_give_batches_of_their_structure():
    loaders = {"a": DataLoader(NUMBERS, batch_size=2), "b": [DataLoader(NUMBERS, batch_size=3)]}
    batches = list(_draw(loaders, 2, "0"))
    assert [(len(batch["a"]), len(batch["b"][0])) for batch in batches] == [(2, 3), (2, 3)]


def test_what_measuring_would_use_up_is_refused():
    with pytest.raises(TypeError, match=r"expected a DataLoader to draw batches from .* got a list_iterator"):
        drawn(iter(NUMBERS))

    class Once(IterableDataset):
        rows = iter(NUMBERS)

        def __len__(self):
            return len(NUMBERS)

        def __iter__(self):
            return self.rows

    with pytest.raises(ValueError, match=r"Once\.__iter__ returns the same iterator"):
        drawn(DataLoader(Once(), batch_size=2))


class Two(Module):
    """Trains on two loaders, in batches that it changes on their way to the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "scaled": 2 * batch["a"][0]}

    def training_step(self, batch, batch_idx):
        output = self.net(batch["scaled"]) + self.net(batch["b"][0])
        return nn.functional.cross_entropy(output, batch["a"][1])


@pytest.mark.slow
def test_combined_loaders_and_hooks_of_the_transfer_reach_the_measured_batches(tmp_path):
    loaders = {"a": make_loader(), "b": DataLoader(make_data(12), batch_size=2)}
    callback, witness = adaptive(every="epoch"), Witness()
    fit(tmp_path, callback, witness, module=Two(), loader=CombinedLoader(loaders, "min_size"))
    assert len(callback.adaptive.history) == 1
    assert len(witness.steps) == 6
    assert all(trained == gradients.keys() for trained, gradients in witness.steps)
