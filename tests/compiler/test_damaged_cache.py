"""Files in Inductor's cache that a killed process left unfinished are deleted and compiled again."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gtcompile.compiler.inductor import damaged_files, despite_damaged_files

PROGRAM = """
import logging, sys, torch
logging.basicConfig(level=logging.WARNING)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
run = torch.compile(model, backend="gtcompile", options={"variants": sys.argv[1]})
run(torch.ones(4, 8)).square().sum().backward()
with torch.no_grad():
    run(torch.ones(4, 8))
print(model[0].weight.grad.sum().item())
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


class WrappedError(Exception):
    """As torch wraps the errors of backends."""

    def __init__(self, inner: Exception) -> None:
        super().__init__("an error")
        self.inner_exception = inner


def unreadable(path: Path) -> Exception:
    return WrappedError(ImportError(f"{path}: file too short"))


def test_an_unfinished_file_is_deleted_and_the_code_compiled_again(cache, caplog, monkeypatch):
    path = cache / "ab" / "kernel.so"
    path.parent.mkdir()
    path.touch()
    half_loaded = ModuleType("half_loaded")
    half_loaded.__spec__ = type("Spec", (), {"origin": str(path)})  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "half_loaded", half_loaded)

    def compile_code() -> str:
        if path.exists():
            raise unreadable(path)
        return "compiled"

    with caplog.at_level(logging.WARNING):
        assert despite_damaged_files(compile_code) == "compiled"
    assert "half_loaded" not in sys.modules
    assert str(path) in caplog.text


def test_a_file_that_stays_damaged_is_an_error(cache):
    path = cache / "kernel.so"
    calls = []

    def compile_code() -> None:
        calls.append(None)
        raise unreadable(path)

    with pytest.raises(WrappedError):
        despite_damaged_files(compile_code)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("{cache}/a/k.so: file too short", {"a/k.so"}),
        ("{cache}/k.so: invalid ELF header", {"k.so"}),
        ("ld: {cache}/a/k.main.o: file not recognized: file truncated", {"a/k.main.o"}),
        ("{cache}/k.so: undefined symbol: f", set()),
        ("/elsewhere/k.so: file too short", set()),
    ],
)
def test_only_unfinished_files_of_the_cache_are_found(cache, message, named):
    error = WrappedError(OSError(message.format(cache=cache)))
    assert damaged_files(error) == {cache / name for name in named}


@pytest.mark.long
@pytest.mark.parametrize("variants", ["specialized", "hoisted"])
def test_a_run_after_a_killed_one_succeeds(cache, variants):
    command = [sys.executable, "-c", PROGRAM, variants]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=True)

    first = run()
    # Inductor also keeps programs there that find out what the processor can do; their failure is no error
    sources = {path: path.with_suffix(".cpp").read_text() for path in cache.rglob("*.so")}
    files = [path for path, source in sources.items() if re.search(r"\bkernel\(", source)]
    assert files
    for path in files:
        path.write_bytes(b"")
    second = run()
    assert second.stdout == first.stdout
    assert "was not written to its end" in second.stderr
    assert "was not written to its end" not in run().stderr
