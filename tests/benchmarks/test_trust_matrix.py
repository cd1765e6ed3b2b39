"""The trust matrix: gtcompile is right in every row, and each row has a way that is not, or once was not."""

import pytest
import torch

from benchmarks.trust_matrix import SCENARIOS, WAYS, checkpointing, drift, gradient_set, silent_eager

TOGGLED, LISA, OURS = WAYS


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())
def test_gtcompile_is_right(scenario):
    torch.compiler.reset()
    finding = scenario(OURS)
    assert finding.right, finding.seen


@pytest.mark.parametrize(
    ("scenario", "way"),
    [
        (drift, LISA),
        (gradient_set, LISA),
        (checkpointing, LISA),
        pytest.param(silent_eager, TOGGLED, marks=pytest.mark.long),
    ],
)
def test_a_failure_is_seen_where_there_is_one(scenario, way):
    torch.compiler.reset()
    assert not scenario(way).right
