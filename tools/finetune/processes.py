"""The processes that torchrun started for one run."""

import contextlib
import gc
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState

from gtcompile.distributed.ranks import Ranks

PATIENCE = timedelta(days=1)
"""How long processes wait for the first one, which evaluates alone. If one fails, torchrun ends all."""


@contextlib.contextmanager
def joined_processes() -> Iterator[Ranks]:
    """Join the processes of this run, as the trainer will; without torchrun, it is this process alone."""
    if not dist.is_torchelastic_launched():
        yield Ranks(None)
        return
    PartialState(cpu=not torch.cuda.is_available())
    try:
        yield Ranks(dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        gc.collect()  # models hold groups, and gloo's threads may abort a process whose Python has ended
        dist.destroy_process_group()
