"""Load a language model and its tokenizer by hub id, from a local directory, or by `demo` or `smollm2`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gtcompile.tools.common.options import DEMO, check_model
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer
from gtcompile.tools.models.demo_model import load_demo
from gtcompile.tools.models.smollm2 import SMOLLM2, smollm2_directory

WEIGHTS = ("*.safetensors", "*.bin")
"""Patterns of files that hold weights."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)
"""A directory without any of these has no tokenizer, though `AutoTokenizer` may make one up."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model with the tokenizer that feeds it."""

    model: PreTrainedModel
    """The model in training mode, in float32."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer; it has an end-of-sequence and a padding token."""
    tokenizer_origin: str
    """Where the tokenizer comes from, for the report."""
    random_weights: tuple[str, ...] = ()
    """Parameters that the checkpoint lacks, so that they start at random."""

    @property
    def encoder_decoder(self) -> bool:
        """Whether sources go to an encoder of their own."""
        return bool(self.model.config.is_encoder_decoder)


def load_language_model(
    name: str, tokenizer_name: str | None = None, *, weights: bool = True
) -> LanguageModel:
    """Load a model and its tokenizer.

    Args:
        name: hub id, local directory, `demo`, or `smollm2` (needs no hub).
        tokenizer_name: hub id or directory of another tokenizer, or `bytes` for one token per byte. None
            takes the model's own, and one token per byte for a local directory without one.
        weights: false leaves the model on the meta device.

    Raises:
        ValueError: the model or the tokenizer could not be loaded, or do not fit each other.
    """
    name = _directory_of(name)
    own = load_demo()[1] if name == DEMO else None
    model, random_weights = _load_weights(name) if weights else (model_on_meta(name), ())
    tokenizer, origin = _tokenizer(name, tokenizer_name, model.config, own)
    _complete(tokenizer, model)
    return LanguageModel(model.train(), tokenizer, origin, random_weights)


def load_model(name: str) -> PreTrainedModel:
    """A model with its weights, in float32.

    Raises:
        ValueError: it could not be loaded.
    """
    return _load_weights(_directory_of(name))[0]


def _directory_of(name: str) -> str:
    """The directory of a model that a package carries; any other name itself."""
    return str(smollm2_directory()) if name == SMOLLM2 else name


def _load_weights(name: str) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A model with its weights, and the names of those that its checkpoint lacks."""
    if name == DEMO:
        return load_demo()[0], ()
    config = load_config(name)
    if _lacks_weights(name):
        raise ValueError(
            f"{name!r} has a configuration and no weights: expected {' or '.join(WEIGHTS)} in its folder; "
            f"gtcompile inspect and bench need none"
        )
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _load("model", name, _auto_class(config), config=config, **options)
    if info["mismatched_keys"]:
        fqn, saved, own = min(info["mismatched_keys"])
        raise ValueError(
            f"the weights of {name!r} do not fit its configuration: {fqn} is {list(saved)} in the file and "
            f"{list(own)} by config.json"
        )
    return model, tuple(sorted(info["missing_keys"]))


def model_with_values(name: str, config: PretrainedConfig) -> tuple[PreTrainedModel, str]:
    """A model that can be run (training mode, float32, on the CPU), and the origin of its weights in words.

    Args:
        name: hub id, local directory, or `demo`.
        config: of the model; a local directory without weights gets random weights, the same every time.

    Raises:
        ValueError: it could not be loaded.
    """
    if not _lacks_weights(name):
        return load_model(name).train(), f"the weights of {name}"
    torch.manual_seed(0)
    made: PreTrainedModel = _auto_class(config).from_config(config, dtype=torch.float32)
    return made.train(), "random weights"


def _lacks_weights(name: str) -> bool:
    """Whether a name is a local directory without weights."""
    return Path(name).is_dir() and not any(file for kind in WEIGHTS for file in Path(name).glob(kind))


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a model on the hub or in a directory.

    Raises:
        ValueError: there is none.
    """
    name = _directory_of(name)
    check_model(name)
    config: PretrainedConfig = _load("configuration", name, AutoConfig)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        # neither training nor generation can begin without one
        config.decoder_start_token_id = config.pad_token_id
    return config


def model_on_meta(name: str) -> PreTrainedModel:
    """A model's architecture with all tensors on the meta device; only its configuration is read.

    Raises:
        ValueError: the configuration could not be loaded, or is not that of a language model.
    """
    return model_with_random_weights(name, torch.device("meta"))


def model_with_random_weights(name: str, device: torch.device) -> PreTrainedModel:
    """A model of a configuration alone, in training mode, float32 on a real device.

    Raises:
        ValueError: the configuration could not be loaded, or is not that of a language model.
    """
    config = load_demo()[0].config if name == DEMO else load_config(name)
    options = {} if device.type == "meta" else {"dtype": torch.float32}
    with device:
        try:
            model: PreTrainedModel = _auto_class(config).from_config(config, **options)
        except ValueError as error:
            raise ValueError(_not_a_language_model(name, config, error)) from error
    model.train()
    return model


def _not_a_language_model(name: str, config: PretrainedConfig, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    if "Unrecognized configuration class" not in reason:
        return f"could not build the model of {name!r}: {reason}"
    kind = "an encoder-decoder" if config.is_encoder_decoder else "a causal language model"
    return (
        f"transformers cannot build {kind} from the {type(config).__name__} of {name!r}; any other model can "
        f"be given as module:function, a function that returns the model and a batch"
    )


def _auto_class(config: PretrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _load(what: str, name: str, auto_class: Any, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if "config" in options and "Unrecognized configuration class" in str(error):
            raise ValueError(_not_a_language_model(name, options["config"], error)) from error
        reason = str(error).strip().partition("\n")[0]
        here = "" if Path(name).exists() else f"; {Path(name).absolute()} does not exist either"
        raise ValueError(f"could not load the {what} of {name!r}: {reason.rstrip('.')}{here}") from error


def _tokenizer(
    name: str, wanted: str | None, config: PretrainedConfig, own: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedTokenizerBase, str]:
    if wanted is None and own is not None:
        return own, "the demo's own"
    if wanted is None and Path(name).is_dir() and not has_tokenizer(Path(name)):
        return byte_tokenizer(config), f"{name} has none; one token per byte was made for it"
    if wanted == "bytes":
        return byte_tokenizer(config), "one token per byte, by --tokenizer bytes"
    source = wanted or name
    return _load("tokenizer", source, AutoTokenizer), source


def has_tokenizer(directory: Path) -> bool:
    """Whether a local model directory holds a tokenizer."""
    return any((directory / file).is_file() for file in TOKENIZER_FILES)


def _complete(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Let tokenizer and model agree on the padding and end-of-sequence tokens."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so no answer could end; pass another --tokenizer"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    size = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the model {size} embeddings; pass another --tokenizer"
        )
    for settings in (model.config, model.generation_config):
        settings.pad_token_id = tokenizer.pad_token_id
        if not _ends_with(settings.eos_token_id, tokenizer.eos_token_id):
            settings.eos_token_id = tokenizer.eos_token_id
    if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id


def _ends_with(known: int | list[int] | None, token: int) -> bool:
    return token in known if isinstance(known, list) else token == known
