"""A training whose backward is compiled beside it, in a process as a user's: prints what came of it."""

import time

import torch

from gtcompile.compiler import background, backward_plans
from gtcompile.compiler.background import TRIALS, Contest
from gtcompile.compiler.blocks import compile_blocks
from gtcompile.costs.backward_costs import backward_costs
from gtcompile.graph.flops import count_flops
from gtcompile.state.trained_set import train_only
from gtcompile.testing import assert_same_gradients, reference_gradients
from gtcompile.tools.bench.baselines import compilations
from gtcompile.torch_internals import dynamo_counters
from tests.support.models import Recipe, make_batch, step

races: list[Contest] = []


class Watched(Contest):
    """A contest that the code compiled beside always wins."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        races.append(self)

    def _decide(self, challenger) -> None:
        super()._decide(challenger)
        self._present = challenger


def main() -> None:
    torch.set_num_threads(1)
    background.PATIENCE = 2
    backward_plans.Contest = Watched  # type: ignore[misc]
    model, batch = Recipe(("attention",) * 2).model(), make_batch()
    costs = backward_costs(model, batch)
    compile_blocks(model, specialize="beside")
    trained = train_only(model, ["layers.*.mlp.up.*", "layers.*.norm.weight"])
    expected = reference_gradients(model, batch)
    step(model, batch)
    misses, until = dynamo_counters["inductor"]["fxgraph_cache_miss"], time.monotonic() + 900
    while not all(race.decided for race in races) and time.monotonic() < until:
        time.sleep(0.1)  # the other process is the nicer one
        step(model, batch)
        assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)
    assert len(races) == 2, "where the backward ends, and above"
    assert all(min(map(len, race._times)) > TRIALS for race in races), "both ways were tried"
    with count_flops() as counter:
        step(model, batch)
    assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)
    assert counter.get_total_flops() == costs.step_flops(trained)
    assert dynamo_counters["inductor"]["fxgraph_cache_miss"] == misses, "this process compiled nothing"
    print("right", compilations())


if __name__ == "__main__":
    main()
