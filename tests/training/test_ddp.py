"""DistributedDataParallel on two gloo ranks, against one process; what would diverge is refused."""

import contextlib
import gc
import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gtcompile import AdaptiveBackprop, train_only
from gtcompile.distributed.ranks import Ranks
from gtcompile.torch_internals import FakeTensor, FakeTensorMode
from gtcompile.training import ddp
from gtcompile.training.ddp import check_current_device, ranks_of
from tests.support import launching
from tests.support.launching import run_on_ranks, torchrun
from tests.support.models import Regression
from tests.support.trainer import Replay, losses, train, weights

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def run(*cases: str) -> subprocess.CompletedProcess[str]:
    """Run cases one after the other on two ranks: to start these takes longer than most cases."""
    return launching.run(torchrun("-m", "tests.ranks.data_parallel_run", *cases))


@pytest.mark.parametrize("case", ["eager-1-copies", "plain-2-copies", "plain-1-views", "inductor-1-copies"])
@pytest.mark.long
def test_two_ranks_train_what_one_process_trains_however_they_are_set(case):
    result = run(case)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_two_ranks_train_what_one_process_trains_and_what_fails_on_one_is_raised_on_all():
    result = run("eager-2-views", "failure")
    assert result.returncode == 0, result.stderr
    assert "rank 1: ValueError: expected at least two batches" in result.stdout
    assert "rank 0: GTCompileError: rank 1 failed, so all ranks stop: ValueError: expected" in result.stdout


def test_a_model_on_another_gpu_than_the_current_one_is_refused(monkeypatch):
    elsewhere = FakeTensor(FakeTensorMode(), torch.empty(2, device="meta"), torch.device("cuda:1"))
    model = torch.nn.ParameterList([torch.nn.Parameter(elsewhere)])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    check_current_device(model)
    check_current_device(torch.nn.Linear(2, 2))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match=r"model is on cuda:1, and its current CUDA device is cuda:0"):
        check_current_device(model)


@pytest.mark.usefixtures("one_rank")
def test_with_nccl_the_current_device_is_checked_for_both_wrappers(monkeypatch):
    checked = []
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(ddp, "check_current_device", checked.append)
    replicated = DistributedDataParallel(Regression(), find_unused_parameters=True)
    whole = Regression()
    sharded = fully_shard(Regression(), mesh=init_device_mesh("cpu", (1,)))
    for model in (replicated, whole, sharded):
        ranks_of(model)
    assert checked == [replicated, sharded]


@pytest.mark.usefixtures("one_rank")
def test_a_failure_keeps_nothing_alive_that_holds_processes():
    def fail():
        raise ValueError("of this rank")

    ranks = Ranks(dist.group.WORLD)
    kept = weakref.ref(ranks)
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            ranks.together(fail)
        del ranks
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.long
def test_batches_that_contradict_each_other_are_measured_within_each_on_all_ranks():
    result = run("contradiction")
    assert result.returncode == 0, result.stderr


@pytest.mark.long
@pytest.mark.parametrize("what", ["budget", "model"])
def test_ranks_that_differ_are_told_so(what):
    result = run(what)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert f"rank {rank}: ValueError: the {what} differs between ranks: rank 1" in result.stdout


@pytest.mark.long
def test_a_rank_that_dies_ends_the_others():
    result = run("death")
    assert result.returncode != 0
    assert "rank 0 is still alive" not in result.stdout


def adaptive_of(wrapped: DistributedDataParallel) -> AdaptiveBackprop:
    return AdaptiveBackprop(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-2), 0.6)


@pytest.mark.usefixtures("one_rank")
def test_a_wrapper_that_waits_for_every_gradient_is_refused():
    with pytest.raises(ValueError, match="find_unused_parameters=True"):
        adaptive_of(DistributedDataParallel(Regression()))


@pytest.mark.filterwarnings("ignore:You passed find_unused_parameters")
@pytest.mark.usefixtures("one_rank")
def test_a_static_graph_is_refused():
    wrapped = DistributedDataParallel(Regression(), find_unused_parameters=True, static_graph=True)
    with pytest.raises(ValueError, match="static_graph=True fixes"):
        adaptive_of(wrapped)


@pytest.mark.usefixtures("one_rank")
def test_a_second_communication_hook_is_refused():
    wrapped = DistributedDataParallel(Regression(), find_unused_parameters=True)
    wrapped.register_comm_hook(None, allreduce_hook)
    with pytest.raises(ValueError, match="a communication hook already"):
        adaptive_of(wrapped)


@pytest.mark.usefixtures("one_rank")
def test_a_parameter_frozen_before_wrapping_is_refused():
    model = Regression()
    train_only(model, ["layers.1.*"])
    with pytest.raises(ValueError, match=r"\d of \d trainable parameters were frozen when"):
        adaptive_of(DistributedDataParallel(model, find_unused_parameters=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("case", ["replicated", pytest.param("sharded", marks=pytest.mark.long)])
def test_the_trainer_trains_on_two_ranks_what_one_process_trains_and_goes_on(case, tmp_path):
    run_on_ranks("trainer_run", case, tmp_path)
    outcome = torch.load(tmp_path / "outcome")
    assert len(set(map(frozenset, outcome["sets"]))) > 3
    replay = Replay(outcome["sets"])
    alone = train(tmp_path, replay, num_train_epochs=2, per_device_train_batch_size=4)
    torch.testing.assert_close(outcome["losses"], losses(alone), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outcome["weights"], weights(alone.model), rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_a_plain_loop_that_accelerate_launches_trains_what_is_selected():
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["-m", "tests.ranks.accelerate_run"]
    result = launching.run(command)
    assert result.returncode == 0, result.stderr
    assert "2 processes, 4 selections: the same sets and weights" in result.stdout
