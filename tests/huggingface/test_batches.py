"""Batches to measure importance on: which data and collators are refused."""

import pytest
import torch

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


def test_batches_that_another_method_completes_are_refused(tmp_path):
    settings = {"data_collator": lambda rows: {"prompt": ["text"] * len(rows)}}
    with pytest.raises(
        TypeError, match="got a dict of 'prompt' without any: a trainer that makes its batches"
    ):
        train(tmp_path, adaptive(), max_steps=1, trainer_settings=settings)
