"""Importing the package is quick, and the command line refuses mistakes without importing torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gtcompile
from gtcompile.lazy_names import lazy_names
from gtcompile.tools import finetune, inspect

HEAVY = ("torch", "transformers", "lightning", "datasets", "numpy", "scipy", "networkx", "onnx")
COMMAND = f"""
import sys
from gtcompile.cli import main
try:
    main()
finally:
    print(*({{name for name in {HEAVY} if name in sys.modules}} or ["nothing heavy"]), file=sys.stderr)
"""
COMPARE = ["compare", "demo", "--dataset", "demo", "--output", "x"]
RUN = ["finetune", "--model", "demo", "--dataset", "demo"]


def python(code: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_importing_the_package_imports_nothing_heavy_and_its_names_are_there() -> None:
    code = f"""
import sys, gtcompile
print([name for name in {HEAVY} if name in sys.modules], gtcompile.__version__)
assert "compile_blocks" in dir(gtcompile)
from gtcompile import BudgetError
assert BudgetError("", 0.5).minimum_budget_fraction == 0.5
"""
    done = python(code)
    assert done.stdout == f"[] {gtcompile.__version__}\n", done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["finetune", "--help"],
        ["inspect", "--help"],
        ["bench", "--help"],
        ["compare", "--help"],
    ],
)
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    done = python(COMMAND, *arguments)
    assert (done.returncode, done.stderr) == (0, "nothing heavy\n")
    assert done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RUN, "--budget", "2"], "--budget: expected in (0, 1], got 2.0"),
        ([*RUN, "--lr", "-1"], "--lr: expected greater than 0"),
        (["finetune", "--model", "demo"], "expected --dataset, or a --config or --resume that names it"),
        (["finetune", "--resume", "none"], "nothing to resume: none holds no run"),
        ([*RUN, "--resume", "none", "--output", "x"], "--resume continues a run in its folder"),
        (["finetune", "--resume", "none", "--dry-run"], "--dry-run plans a run from its beginning"),
        ([*RUN, "--output", "taken"], "the output folder taken is not empty"),
        ([*RUN, "--args", "warmup=3"], "near names: warmup_steps"),
        ([*RUN, "--args", "bf16"], "--args: expected name=value"),
        ([*RUN, "--args", "bf16=yes"], "bf16: expected a value of type bool, got 'yes'"),
        ([*RUN, "--config", "none.yaml"], "none.yaml cannot be read"),
        ([*RUN, "--train-split", "x["], "expected a split such as train"),
        ([*RUN, "--eval-split", "train"], "would share records"),
        (["finetune", "--model", "demo", "--dataset", "none"], "--dataset: expected one of demo"),
        (["finetune", "--model", "demo", "--dataset", "piqa", "--data-dir", "none"], "--data-dir: no folder"),
        (["finetune", "--model", "./none", "--dataset", "demo"], "no model in './none'"),
        (["inspect", "demo", "--budget", "0"], "--budget: expected in (0, 1], got 0.0"),
        (["inspect", "demo", "--length", "0"], "--length: expected at least 1, got 0"),
        (["inspect", "demo", "--sort", "age"], "--sort: expected one of name, cost"),
        (["inspect", "demo", "--export", "x.png"], "--export: expected a file ending in .json"),
        (["inspect", "demo", "--html", "none/x.html"], "--html: there is no folder"),
        (["inspect", "demo", "--importances", "none.json"], "none.json is not the selections.json of a run"),
        (["inspect", "./none"], "no model in './none'"),
        (["export", "demo", "--onnx", "x.onnx", "--optimizer", "lion"], "--optimizer: expected sgd or adamw"),
        (["export", "demo", "--onnx", "x.onnx", "--train", "*", "--budget", "0.5"], "--train or --budget"),
        (["bench", "demo", "--budgets", "1.5"], "--budgets: expected shares between 0 and 1"),
        (["bench", "demo", "--dtype", "int8"], "--dtype: expected float32 or bfloat16, got 'int8'"),
        (["compare", "demo", "--output", "x", "--data-dir", "none"], "--data-dir: no folder none"),
        (["compare", "demo", "--output", "x", "--data-dir", "."], "--data-dir: . lacks files of scitldr"),
        ([*COMPARE, "--output", "taken/file"], "--output: taken/file is a file"),
        ([*COMPARE, "--dataset", "none"], "--dataset: expected one of scitldr, dialogsum, piqa,"),
        ([*COMPARE, "--data-dir", "x"], "--data-dir: expected none with --dataset demo, got 'x'"),
        ([*COMPARE, "--arms", "full,magic"], "--arms: expected one of full, "),
        ([*COMPARE, "--arms", ","], "--arms: expected one of full, "),
        ([*COMPARE, "--budgets", "1.5"], "--budgets: expected shares in (0, 1], got (1.5,)"),
        ([*COMPARE, "--seeds", "0,a"], "--seeds: expected whole numbers separated by commas, got '0,a'"),
        ([*COMPARE, "--seeds=-1"], "--seeds: expected numbers of at least 0"),
        ([*COMPARE, "--purposes", "time"], "--purposes: expected one of steps, flops, got 'time'"),
        ([*COMPARE, "--steps", "0"], "--steps: expected at least 1, got 0"),
        ([*COMPARE, "--scored", "-1"], "--scored: expected at least 0, got -1"),
        ([*COMPARE, "--answer-length", "0"], "--answer-length: expected at least 1, got 0"),
        ([*COMPARE, "--threads", "0"], "--threads: expected at least 1, got 0"),
        (["bench", "demo", "--rounds", "0"], "--rounds: expected at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line_before_anything_heavy_is_imported(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    done = python(COMMAND, *arguments, folder=tmp_path)
    error, imported = done.stderr.splitlines()
    assert done.returncode == 2
    assert error.startswith("error: ")
    assert message in error
    assert imported == "nothing heavy"


@pytest.mark.parametrize(
    "package", [gtcompile, gtcompile.lightning, inspect, finetune], ids=lambda package: package.__name__
)
def test_type_checkers_see_the_names_that_are_imported_lazily(package: object) -> None:
    tree = ast.parse(Path(package.__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {a.asname: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    modules = getattr(package, "_MODULES", {})
    assert seen == package._NAMES | {name: home.rpartition(".")[0] for name, home in modules.items()}
    assert all(a.name == a.asname for n in block.body for a in n.names)


def test_an_unknown_name_is_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'a' has no attribute 'b'"):
        lazy_names("a", {})("b")
