"""A tokenizer made on the spot, one token per byte, for models that come without one."""

from itertools import count

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PretrainedConfig, PreTrainedTokenizerFast

_SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}


def byte_tokenizer(config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that keeps the special token ids of a model's configuration.

    The 256 bytes take the lowest ids that are free. A decoder's text begins with the token for the beginning
    of a sequence, an encoder-decoder's ends with the one for its end.

    Args:
        config: of the model; its `pad_token_id`, `bos_token_id` and `eos_token_id` are kept where set.

    Raises:
        ValueError: the model's vocabulary is too small.
    """
    special = _special_ids(config)
    vocabulary = {_SPECIAL[role]: index for role, index in special.items()}
    free = (index for index in count() if index not in special.values())
    vocabulary |= dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), free, strict=False))
    needed = max(vocabulary.values()) + 1
    if needed > config.vocab_size:
        raise ValueError(
            f"the model's vocabulary of {config.vocab_size} is too small for one token per byte, which needs "
            f"{needed}. Pass --tokenizer with a tokenizer whose ids stay below {config.vocab_size}."
        )
    names = {role: _token_at(vocabulary, index) for role, index in special.items()}
    backend = _backend(vocabulary, names, encoder_decoder=bool(config.is_encoder_decoder))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=names["pad"],
        bos_token=names["bos"],
        eos_token=names["eos"],
        clean_up_tokenization_spaces=False,
    )


def _special_ids(config: PretrainedConfig) -> dict[str, int]:
    """Token id of each role; one the model lacks takes the next id from 0 that is free."""
    given = {role: getattr(config, f"{role}_token_id", None) for role in _SPECIAL}
    usable = {
        role: index
        for role, index in given.items()
        if isinstance(index, int) and 0 <= index < config.vocab_size
    }
    free = (index for index in count() if index not in usable.values())
    return {role: usable[role] if role in usable else next(free) for role in _SPECIAL}


def _token_at(vocabulary: dict[str, int], wanted: int) -> str:
    """The last token with this id: roles that share an id share a token."""
    return [token for token, index in vocabulary.items() if index == wanted][-1]


def _backend(vocabulary: dict[str, int], names: dict[str, str], *, encoder_decoder: bool) -> Tokenizer:
    unique = {index: token for token, index in vocabulary.items()}
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in unique.items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    frame = f"$A {names['eos']}" if encoder_decoder else f"{names['bos']} $A"
    tokens = [(names[role], vocabulary[names[role]]) for role in ("bos", "eos")]
    backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=tokens)
    return backend
