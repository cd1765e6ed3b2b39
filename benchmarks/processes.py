"""Work in processes of its own: a crash or an endless loop ends one job, not the benchmark."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any


@dataclass(frozen=True, slots=True)
class Job:
    """Work for one process."""

    name: str
    work: Callable[..., Iterable[Any]]
    """A function of a module, called with the arguments and a deadline; yields results, best at once."""
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """A value that a job yielded."""

    job: str
    value: Any


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a job."""

    job: str
    failure: str
    """Why it ended early; empty if it finished."""


@dataclass(frozen=True, slots=True)
class _Running:
    job: Job
    process: BaseProcess

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def run_jobs(
    jobs: Sequence[Job], *, limit_s: float, workers: int = 1, preload: Collection[str] = ()
) -> Iterator[Result | Ended]:
    """Run jobs, each in a process of its own, and yield what they yield as soon as it arrives.

    All processes end with this one, however it ends. Each job gets as its last argument the time, by
    `time.monotonic()`, at which its fair share of the limit ends: a job that can measure for any time keeps
    to it. At the end of the limit, jobs that still run are stopped, and the others are not started.

    Args:
        jobs: in the order in which they start.
        limit_s: seconds for all of them.
        workers: how many run at a time.
        preload: modules that all jobs need, imported once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    waiting, running = deque(jobs), dict[Connection, _Running]()
    end = time.monotonic() + limit_s
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                share = (end - time.monotonic()) * min(1.0, workers / (len(waiting) + len(running)))
                pipe, started = _start(context, waiting.popleft(), time.monotonic() + share)
                running[pipe] = started
            ready = wait(list(running), max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                message = _receive(pipe, running[pipe])
                if isinstance(message, Ended):
                    running.pop(pipe).stop()
                yield message
        yield from (Ended(started.job.name, "stopped: out of time") for started in running.values())
        yield from (Ended(job.name, "not started: out of time") for job in waiting)
    finally:
        for started in running.values():
            started.stop()


def _start(context: Any, job: Job, deadline: float) -> tuple[Connection, _Running]:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, job, deadline))
    process.start()
    theirs.close()
    return ours, _Running(job, process)


def _receive(pipe: Connection, running: _Running) -> Result | Ended:
    try:
        message: Result | Ended = pipe.recv()
    except EOFError:
        running.process.join()
        message = Ended(running.job.name, f"the process died with exit code {running.process.exitcode}")
    return message


def _serve(pipe: Connection, job: Job, deadline: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one stops the rest
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for value in job.work(*job.arguments, deadline):
            pipe.send(Result(job.name, value))
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        pipe.send(Ended(job.name, f"{type(error).__name__}: {first_line[:300]}"))
    else:
        pipe.send(Ended(job.name, ""))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
