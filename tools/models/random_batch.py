"""A batch of random tokens for a language model, and whether the model runs on rows of its length."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from gtcompile.state.restore import restored
from gtcompile.tools.common.options import BatchShape


def random_batch(model: PreTrainedModel, shape: BatchShape) -> dict[str, torch.Tensor]:
    """Draw random tokens. A decoder has all of them as labels; an encoder-decoder has random answers.

    Args:
        model: its vocabulary is drawn from.
        shape: rows and tokens.

    Returns:
        `input_ids` and `attention_mask` of batch_size x length, `labels` of batch_size x columns; int64.

    Raises:
        ValueError: the model has no vocabulary, so it does not take tokens.
    """
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"{type(model).__name__} has no vocabulary to draw a batch from; give it as module:function, a "
            f"function that returns the model and a batch"
        )
    columns = shape.label_columns(model.config.is_encoder_decoder)
    ids = torch.randint(1, size, (shape.batch_size, shape.length))
    labels = ids if columns == shape.length else torch.randint(1, size, (shape.batch_size, columns))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels.clone()}


def check_length(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
    """Refuse rows that are longer than the model's positions, if the model cannot run on them.

    The model is tried with one row, since rotary positions are computed for any length and learned positions
    are looked up in a table. The trial changes nothing.

    Raises:
        ValueError: the model does not run on rows of this length.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(batch["input_ids"].shape[1], batch["labels"].shape[1])
    if not isinstance(positions, int) or longest <= positions:
        return
    try:
        with restored(model), torch.no_grad():
            model(**{name: value[:1].to(model.device) for name, value in batch.items()})
    except (IndexError, RuntimeError) as error:
        lower = "--length or --target-length" if model.config.is_encoder_decoder else "--length"
        raise ValueError(
            f"{type(model).__name__} has {positions} positions and does not run on {longest} tokens; "
            f"lower {lower}"
        ) from error
