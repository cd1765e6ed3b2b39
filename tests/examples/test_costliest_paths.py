"""The example of the costliest gradient paths prints ten of them, the deepest parameters first."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "costliest_paths.py"


def test_gradients_of_the_first_block_have_the_costliest_paths(capsys):
    paths = runpy.run_path(str(EXAMPLE))["main"]()
    flops = [cost for cost, _, _ in paths]
    assert flops == sorted(flops, reverse=True)
    assert all("layers.0." in parameter or "embed" in parameter for _, _, parameter in paths)
    assert capsys.readouterr().out.count("MFLOP through") == len(paths) == 10
