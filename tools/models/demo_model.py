"""The demo's pretrained decoder, whose files in `demo/` are part of this package."""

from importlib import resources

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def load_demo() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the pretrained decoder and its tokenizer from the installed package.

    Returns:
        The model, in float32 and evaluation mode, and a tokenizer that begins each text with `<s>` and pads
        on the left.
    """
    with resources.as_file(resources.files("gtcompile.tools.models") / "demo") as folder:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model, PreTrainedTokenizerFast.from_pretrained(folder)
