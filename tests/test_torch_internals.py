"""Which torch is refused, and how; that the names are there says the import itself."""

import re
import runpy
from importlib.metadata import requires

import pytest
import torch

from gtcompile import torch_internals
from gtcompile.torch_internals import SUPPORTED, check_version


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.11.0a0+git123", "2.13.0+cu130", "2.15.99", "2.16.0", "3.0.0"]
)
def test_no_torch_is_refused_for_being_new(version):
    check_version(version)


@pytest.mark.parametrize("version", ["1.13.1", "2.9.0", "2.10.2+cpu"])
def test_an_old_torch_is_refused(version):
    expected = f"gtcompile needs torch 2.11 or newer, and this is torch {version}"
    with pytest.raises(ImportError, match=re.escape(expected)):
        check_version(version)


def test_the_tested_range_is_the_one_that_pip_is_told():
    (torch_requirement,) = [r for r in requires("gtcompile") or [] if r.startswith("torch")]
    assert f">={SUPPORTED[0]}" in torch_requirement
    assert f"<{SUPPORTED[1]}" in torch_requirement


def test_the_import_itself_refuses_an_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"this is torch 2\.9\.1"):
        runpy.run_path(torch_internals.__file__)


@pytest.mark.parametrize(
    "name", ["torch._functorch.compile_utils.fx_graph_cse", "torch._pack_padded_sequence"]
)
def test_a_private_name_that_is_gone_is_named_in_one_sentence(monkeypatch, name):
    monkeypatch.delattr(name)
    last = name.rpartition(".")[2]
    with pytest.raises(
        ImportError, match=rf"torch \S+ lacks one of them: .*{last}.*tested with torch >=2.11"
    ):
        runpy.run_path(torch_internals.__file__)
