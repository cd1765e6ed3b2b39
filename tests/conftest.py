"""What every test starts from."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from gtcompile.torch_internals import inductor_config
from tests.support.models import forget_captures

settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile("default")
torch.set_num_threads(1)
# Inductor compiles in the process itself, also in processes that tests start: two workers occupy two cores.
inductor_config.compile_threads = 1
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
gc.disable()  # while modules are imported, which creates no garbage


def pytest_collection_finish() -> None:
    """Enable the garbage collector. To look at what was imported again would take a fifth of all time."""
    gc.freeze()
    gc.enable()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names of parameters as they are; sets in one order in every worker."""
    if isinstance(val, (list, set)) and val and all(isinstance(item, str) for item in val):
        return " ".join(sorted(val))
    return None


@pytest.fixture(autouse=True)
def fresh_torch() -> Iterator[None]:
    """No captures of earlier tests, whose number Dynamo limits, and the same random numbers every time."""
    forget_captures()
    torch.manual_seed(0)
    yield
    forget_captures()


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone, for wrappers that want one."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
