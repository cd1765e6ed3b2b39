"""`fully_shard` on gloo ranks, against one process; single functions on one rank."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from gtcompile import AdaptiveBackprop, backward_costs, measure_importance, train_only
from gtcompile.distributed.fsdp import group_of, link, sharded, whole
from tests.ranks.data_parallel_run import build
from tests.support.launching import run_on_ranks
from tests.support.models import Regression, make_batch, step

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


run = partial(run_on_ranks, "fully_sharded_run")
"""Runs cases one after the other: to start the ranks takes longer than most cases."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "ranks"),
    [
        (["eager-accumulate", "eager-offload-early"], 2),
        *(
            pytest.param([case], ranks, marks=pytest.mark.long)
            for case, ranks in [
                *(("plain", 2), ("inductor", 2), ("eager-bf16", 2)),
                *(("eager", 3), ("plain-hybrid", 4), ("eager-root", 2)),
            ]
        ),
    ],
)
def test_ranks_train_what_one_process_trains_and_send_nothing_else(cases, ranks):
    run(*cases, ranks=ranks)


@pytest.mark.long
def test_language_models_of_transformers_get_the_gradients_of_one_process():
    run("language")


@pytest.mark.long
def test_a_bad_batch_of_one_rank_counts_on_none():
    run("nan")


@pytest.mark.long
def test_what_was_frozen_from_the_start_trains_later_in_the_precision_of_the_policy():
    run("thaw")


@pytest.mark.long
def test_a_set_may_change_at_every_step():
    run("sets")


@pytest.mark.long
def test_ranks_with_different_budgets_are_told_so():
    said = run("budget")
    for rank in range(2):
        assert f"rank {rank}: the budget differs between ranks: rank 1" in said


@pytest.fixture
def model(one_rank):
    mesh = init_device_mesh("cpu", (1,))
    module = build()
    for layer in module.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def test_a_whole_parameter_is_known_by_the_sharded_one(model):
    kept = dict(model.named_parameters())
    assert link(model)
    assert not link(model)
    model.unshard()
    weight = model.head.weight
    assert not isinstance(weight, DTensor)
    assert sharded(weight) is kept["head.weight"]
    assert whole(kept["head.weight"]) is weight
    link(model)
    assert model.head.weight is kept["head.weight"]


def test_a_parameter_that_is_not_sharded_stands_for_itself():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert sharded(parameter) is whole(parameter) is parameter


def test_costs_are_those_of_the_whole_model_and_capturing_changes_nothing(model):
    batch = make_batch()
    parameters = dict(model.named_parameters())
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    ours, theirs = backward_costs(model, batch), backward_costs(build(), batch)
    assert ours.shared_work == theirs.shared_work
    assert ours.forward_flops == theirs.forward_flops
    assert isinstance(model, FSDPModule)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_sharded_model_trains_what_it_is_told_without_any_selection(model):
    train_only(model, ["layers.1.*", "head.bias"])
    step(model, make_batch())
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n in dict(model.named_parameters()) if "layers.1." in n} | {"head.bias"}


@pytest.mark.usefixtures("one_rank")
def test_a_module_with_the_parameters_of_a_sharded_root_has_its_group():
    model = fully_shard(Regression(), mesh=init_device_mesh("cpu", (1,)))
    assert group_of(torch.nn.ParameterList(model.parameters())) is group_of(model) is not None


@pytest.mark.parametrize("two_pass", [False, True])
def test_importance_of_a_sharded_model_is_that_of_the_whole_one(model, two_pass):
    batches, alone = [make_batch(0), make_batch(1)], build()
    measured = [
        measure_importance(module, torch.optim.AdamW(module.parameters()), batches, two_pass=two_pass)
        for module in (model, alone)
    ]
    torch.testing.assert_close(*measured)


@pytest.mark.filterwarnings("ignore:FSDP")
@pytest.mark.usefixtures("one_rank")
def test_version_1_is_refused_with_what_to_use():
    wrapped = FullyShardedDataParallel(Regression(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="fully_shard"):
        AdaptiveBackprop(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1))
