"""The gloo ranks of a script that torchrun started."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist


def leave() -> NoReturn:
    """End the groups and this process, without Python's own end.

    A thread of gloo that lets go of a tensor during that aborts the process
    (https://github.com/pytorch/pytorch/issues/190489), and destroying a group does not end its threads
    while a mesh or a module holds it.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def gloo_ranks() -> Iterator[None]:
    """Join the ranks; where nothing fails, the process ends with the block."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    yield
    leave()
