"""The processes that torchrun started for one run."""

import contextlib
import gc
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from gtcompile.distributed.ranks import Ranks

PATIENCE = timedelta(days=1)
"""How long processes wait for the first one, which evaluates alone. If one fails, torchrun ends all."""


@contextlib.contextmanager
def joined_processes() -> Iterator[Ranks]:
    """Join the processes of this run; without torchrun, it is this process alone.

    Each process takes the GPU of its local rank; without GPUs they communicate through gloo.
    """
    if not dist.is_torchelastic_launched():
        yield Ranks(None)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks(dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        gc.collect()  # models hold groups, and gloo's threads may abort a process whose Python has ended
        dist.destroy_process_group()
