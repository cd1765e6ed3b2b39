"""Compile beside the training: in another process, which leaves what it compiles in Inductor's cache on disk.

Not in a thread: torch's tracing keeps global state (a flag, a patched `nn.Module.__call__`) that compiled
code running meanwhile would trip over. Taking the code from the disk afterwards takes milliseconds.
"""

import logging
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Protocol

import torch
from torch import fx

from gtcompile.compiler.operators import Boxed
from gtcompile.torch_internals import (
    FakeTensorMode,
    GraphPickler,
    GraphPicklerOptions,
    ShapeEnv,
    TracingContext,
    cache_dir,
    compile_fx_inner,
    functorch_config,
    inductor_config,
    inductor_state,
    tracing,
)

logger = logging.getLogger(__name__)
PATIENCE = 20
"""Calls with one set before it is worth compiling for: a set that changes sooner is not."""
TRIALS = 7
"""Timed calls of each way before one is chosen; the first of each, which warms up, does not count."""


class Pending(Protocol):
    """Work of another process."""

    def done(self) -> bool:
        """Whether it has ended."""

    def failure(self) -> str:
        """Why it failed; empty when it did not."""


class Contest:
    """A backward that can run in two ways, of which the one measured faster stays.

    Args:
        present: what runs until the other is compiled.
        prepare: begins to compile the other in another process, or returns None while that is busy.
        fetch: takes the other from the disk, once it is there.
    """

    def __init__(
        self, present: Boxed, prepare: Callable[[], Pending | None], fetch: Callable[[], Boxed]
    ) -> None:
        self._present, self._prepare, self._fetch = present, prepare, fetch
        self._calls = 0
        self._pending: Pending | None = None
        self._challenger: Boxed | None = None
        self._times: tuple[list[float], list[float]] = [], []
        self.decided = False

    def __call__(self, inputs: list[Any]) -> Sequence[Any]:
        """Run one of the two on the inputs, which are let go."""
        if self.decided:
            return self._present(inputs)
        self._calls += 1
        if self._challenger is not None:
            return self._timed(self._challenger, inputs)
        if self._pending is None and self._calls >= PATIENCE:
            self._pending = self._prepare()
        elif self._pending is not None and self._pending.done():
            self._meet(self._pending.failure())
        return self._present(inputs)

    def _meet(self, failure: str) -> None:
        """Take the challenger from the disk; without one there is no contest."""
        if failure:
            logger.warning("compiling beside the training failed, the hoisted backward stays: %s", failure)
            self.decided = True
        else:
            self._challenger = self._fetch()

    def _timed(self, challenger: Boxed, inputs: list[Any]) -> Sequence[Any]:
        turn = self._calls % 2
        device = next((value.device for value in inputs if isinstance(value, torch.Tensor)), None)
        start = _clock(device)
        outputs = (self._present, challenger)[turn](inputs)
        self._times[turn].append(_clock(device) - start)
        if min(map(len, self._times)) > TRIALS:
            self._decide(challenger)
        return outputs

    def _decide(self, challenger: Boxed) -> None:
        present, other = (statistics.median(times[1:]) for times in self._times)
        logger.info("compiled for its set, a backward takes %.2f times as long as hoisted", other / present)
        if other < present:
            self._present = challenger
        self._challenger, self.decided = None, True


def _clock(device: torch.device | None) -> float:
    """Seconds, once the device has done what it was asked."""
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def compile_beside(
    module: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any], settings: Mapping[str, Any]
) -> "Compilation | None":
    """Begin to compile a graph in another process.

    Args:
        module: of operators; left as it is.
        inputs: fake tensors, one per placeholder, of sizes that do not change.
        options: keyword arguments of Inductor's `compile_fx_inner`.
        settings: of Inductor, beside those that are in force here: all are part of its cache's key.

    Returns:
        What is done when the code is on the disk; None while another graph is being compiled.
    """
    if any(not compilation.done() for compilation in _begun):
        return None
    graph = GraphPickler.dumps((module, list(inputs), dict(options)), GraphPicklerOptions(ops_filter=None))
    in_force = inductor_config.save_config_portable() | dict(settings)
    _begun[:] = [Compilation(pickle.dumps((graph, in_force, torch.get_num_threads())))]
    return _begun[0]


class Compilation:
    """A process that compiles one graph, and ends with this one."""

    def __init__(self, work: bytes) -> None:
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 the process writes to it
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache_dir()}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with tempfile.TemporaryFile() as file:
            file.write(work)
            file.seek(0)
            command = [sys.executable, "-m", "gtcompile.compiler.background"]
            self._process = subprocess.Popen(
                command, env=environment, stdin=file, stdout=subprocess.DEVNULL, stderr=self._said
            )
        weakref.finalize(self, self._process.kill)

    def done(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def failure(self) -> str:
        """Why it failed, the last thing it said; empty when it did not."""
        status = self._process.wait()
        with self._said as said:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
        return "" if status == 0 else [f"exit status {status}", *lines][-1]


_begun: list[Compilation] = []


def _compile(work: bytes) -> None:
    """What the other process does; the training goes first where they share processors."""
    os.nice(10)
    graph, settings, threads = pickle.loads(work)
    torch.set_num_threads(threads)  # code for a CPU is made for a number of them
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sent: Any = GraphPickler.loads(graph, mode)
    module, inputs, options = sent
    with (
        tracing(TracingContext(mode)),
        inductor_state.set_fake_mode(mode),
        inductor_config.patch(settings),
        functorch_config.patch({"donated_buffer": False}),
        torch.no_grad(),
    ):
        compile_fx_inner(module, inputs, **options)


if __name__ == "__main__":
    _compile(sys.stdin.buffer.read())
