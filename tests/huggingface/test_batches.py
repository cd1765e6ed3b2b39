"""Batches to measure importance on: which data and collators are refused."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerState

from gtcompile.huggingface.batches import draw_batches, prepared
from tests.support.trainer import adaptive, make_data, train


def test_data_that_measuring_would_use_up_are_refused(tmp_path):
    class Once(torch.utils.data.IterableDataset):
        rows = iter(make_data())

        def __iter__(self):
            return self.rows

    with pytest.raises(ValueError, match=r"Once\.__iter__ returns the same iterator"):
        train(tmp_path, adaptive(), data=Once(), max_steps=1)


def test_batches_that_are_no_dictionary_are_refused(tmp_path):
    with pytest.raises(
        TypeError,
        match=r"Trainer\._prepare_inputs to return a dictionary for compute_loss with tensors in it",
    ):
        train(tmp_path, adaptive(), max_steps=1, trainer_settings={"data_collator": list})


def test_too_few_examples_to_measure_on_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 2 training examples to measure importance on, got 1"):
        train(tmp_path, adaptive(), data=make_data(1), max_steps=1)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 6))
def test_lists_that_repeat_give_the_batches_asked_for_or_an_error(examples, size, count):
    class Repeating:
        """Yields each list twice, as samplers do whose trainer takes several steps with it."""

        def __iter__(self):
            for start in range(0, examples, size):
                yield from [list(range(start, min(start + size, examples)))] * 2

    loader = SimpleNamespace(dataset=range(examples), batch_sampler=Repeating(), collate_fn=list)
    trainer = SimpleNamespace(
        _prepare_inputs=lambda batch: {"rows": torch.tensor(batch)}, state=TrainerState()
    )
    there = -(-examples // size)
    batches = prepared(trainer, draw_batches(loader, count, size, "0"), count)
    if there < count:
        with pytest.raises(ValueError, match=r"training (examples|data)"):
            list(batches)
    else:
        assert len({tuple(batch["rows"].tolist()) for batch in batches}) == count


def test_batches_that_another_method_completes_are_refused(tmp_path):
    settings = {"data_collator": lambda rows: {"prompt": ["text"] * len(rows)}}
    with pytest.raises(
        TypeError, match="got a dict of 'prompt' without any: a trainer that makes its batches"
    ):
        train(tmp_path, adaptive(), max_steps=1, trainer_settings=settings)
