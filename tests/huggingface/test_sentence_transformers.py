"""Trainers of sentence-transformers: their steps cost what is predicted, with gradients of eager freezing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, BertModel, Trainer, TrainerCallback

from gtcompile import AdaptiveBackpropCallback, CaptureError
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer
from tests.support import trl_trainers as tiny

sentences = pytest.importorskip("sentence_transformers", minversion="6.0")

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of which each release has others
CONFIG = BertConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    num_labels=1,
)
QUIET = {key: value for key, value in tiny.QUIET.items() if key != "gradient_checkpointing"}


def save_model(folder: Any, kind: Any) -> str:
    torch.manual_seed(0)
    kind(CONFIG).save_pretrained(folder)
    byte_tokenizer(CONFIG).save_pretrained(folder)
    return str(folder)


def embedding_trainer(folder: Any, callbacks: list[TrainerCallback], loss: str) -> Trainer:
    """Trains sentence embeddings on pairs of texts; those of a batch are each other's negatives."""
    from sentence_transformers.sentence_transformer import losses, modules

    encoder = modules.Transformer(save_model(folder, BertModel))
    model = sentences.SentenceTransformer(modules=[encoder, modules.Pooling(16)], device="cpu")
    trainer: Trainer = sentences.SentenceTransformerTrainer(
        model=model,
        args=sentences.SentenceTransformerTrainingArguments(output_dir=str(folder), **QUIET),
        train_dataset=tiny.preferences().select_columns(["prompt", "chosen"]),
        loss=getattr(losses, loss)(model),
        callbacks=callbacks,
    )
    return trainer


def cross_encoder_trainer(folder: Any, callbacks: list[TrainerCallback]) -> Trainer:
    """Trains a score of pairs of texts."""
    model = sentences.CrossEncoder(save_model(folder, BertForSequenceClassification), device="cpu")
    rows = [(row["prompt"], row["completion"], float(row["label"])) for row in tiny.labelled_answers()]
    texts, answers, labels = zip(*rows, strict=True)
    trainer: Trainer = sentences.CrossEncoderTrainer(
        model=model,
        args=sentences.CrossEncoderTrainingArguments(output_dir=str(folder), **QUIET),
        train_dataset=Dataset.from_dict({"text": texts, "answer": answers, "label": labels}),
        callbacks=callbacks,
    )
    return trainer


def run(make: Callable[..., Trainer], folder: Any, *callbacks: TrainerCallback) -> tiny.Spy:
    spy = tiny.Spy()
    trainer = make(folder, [*callbacks, spy])
    spy.watch(trainer)
    trainer.train()
    return spy


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda *args: embedding_trainer(*args, loss="MultipleNegativesRankingLoss"),
        cross_encoder_trainer,
    ],
    ids=["embeddings", "cross-encoder"],
)
def test_a_step_costs_what_is_predicted_and_has_the_gradients_of_eager_freezing(make, tmp_path):
    callback = AdaptiveBackpropCallback(0.7, compiler="eager", batches=2)
    seen = run(make, tmp_path, callback)
    selection = callback.adaptive.selection
    assert 0 < len(selection.trained) < selection.selectable
    assert seen.trained == [selection.trained] * 2
    assert seen.flops == [selection.step_flops] * 2
    eager = run(make, tmp_path, tiny.Frozen(seen.trained))
    assert seen.gradients[0].keys() == selection.trained
    torch.testing.assert_close(seen.gradients, eager.gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.long
def test_a_loss_that_runs_its_own_backward_is_refused_before_any_step(tmp_path):
    """The Cached... losses embed in small parts, and run the backward of the parts inside of the loss."""
    callback = AdaptiveBackpropCallback(0.7, compiler="eager", batches=2)
    trainer = embedding_trainer(tmp_path, [callback], loss="CachedMultipleNegativesRankingLoss")
    with pytest.raises(CaptureError, match=r"costs are those of SentenceTransformerTrainer\.compute_loss"):
        trainer.train()
    assert trainer.state.global_step == 0
