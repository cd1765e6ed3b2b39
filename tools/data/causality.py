"""Check that a model does not see the tokens that it predicts."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from gtcompile.state.restore import restored

TOLERANCE = 1e-5
"""Difference that rounding may cause, as a share of the largest logit."""


@torch.no_grad()
def check_causal(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Refuse a model whose logits depend on later tokens: it would learn to copy the tokens it predicts.

    The check runs without dropout and changes nothing in the model.

    Args:
        model: takes `input_ids` and returns logits of rows x tokens x vocabulary.
        ids: any text; the check replaces its last token.

    Raises:
        ValueError: replacing the last token changes earlier logits.
    """
    if len(ids) < 2:
        return
    pair = torch.tensor([[*ids[:-1], ids[-1]], [*ids[:-1], 1 if ids[-1] == 0 else 0]], device=model.device)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with restored(model):
            logits = model.eval()(input_ids=pair).logits[:, :-1].float()
    finally:
        for module, mode in modes:
            module.training = mode
    differ = (logits[0] - logits[1]).abs().max()
    if differ > TOLERANCE * logits.abs().max():
        raise ValueError(
            f"{type(model).__name__} sees later tokens when it predicts earlier ones, so it cannot learn to "
            f'continue text; expected a causal model (an encoder needs "is_decoder": true in its config.json)'
        )
