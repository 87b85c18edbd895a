"""Many runs over the cores, each in a process of its own; what is in the cache is not run again.

A process plays one run and ends, so the memory of one is not counted for the next. Each has one thread, for the machine
is shared by as many as it has cores.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Final

from benchmarks.regret.cache import ResultCache, reference_key, run_key
from benchmarks.regret.run import Outcome, Run, play
from benchmarks.regret.traffic import Reference, Traffic
from benchmarks.regret.worlds import WORLDS

Place = tuple[str, int]
"""World and seed."""

_ONE_THREAD: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Results:
    """All that was asked for."""

    references: dict[Place, Reference]
    outcomes: dict[Run, Outcome]


@dataclass(frozen=True, slots=True)
class _Job:
    key: str
    label: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


def execute(
    runs: Sequence[Run],
    cache: ResultCache,
    *,
    workers: int,
    fresh: bool = False,
    started: Callable[[int, int], None] = lambda done, of: None,
    finished: Callable[[str], None] = lambda label: None,
) -> Results:
    """Carry out the runs and compute the references of their worlds.

    Args:
        runs: What to run.
        cache: Where results are kept.
        workers: Processes at a time.
        fresh: Whether to run what is in the cache too.
        started: Told how many jobs are in the cache, and how many there are.
        finished: Told of each job that ends.

    Raises:
        RuntimeError: If a run fails or its process is killed; the other runs are given up.
    """
    places = sorted({(run.world, run.seed, run.impressions) for run in runs})
    references = {
        place: _Job(reference_key(*place), f"{place[0]} {place[1]}: truth", _reference, place) for place in places
    }
    plays = {run: _Job(run_key(run), f"{run.world} {run.seed}: {run.policy}", _play, (run,)) for run in runs}
    jobs = [*references.values(), *plays.values()]
    values = {} if fresh else {job.key: value for job in jobs if (value := cache.get(job.key)) is not None}
    started(len(values), len(jobs))
    _run_missing([job for job in jobs if job.key not in values], cache, values, workers, finished)
    return Results(
        {place[:2]: Reference(**values[job.key]) for place, job in references.items()},
        {run: Outcome.from_json(values[job.key]) for run, job in plays.items()},
    )


def _run_missing(
    jobs: Sequence[_Job],
    cache: ResultCache,
    values: dict[str, Any],
    workers: int,
    finished: Callable[[str], None],
) -> None:
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    # The interpreters that compile for the peers must not write beside the sources.
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache.folder / "numba"))
    waiting, running = deque(jobs), dict[Connection, tuple[BaseProcess, _Job]]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                receive, process = _start(waiting[0])
                running[receive] = process, waiting.popleft()
            ready = wait(list(running))
            for receive in [receive for receive in running if receive in ready]:
                process, job = running.pop(receive)
                values[job.key] = _result(receive, process, job.label)
                cache.put(job.key, values[job.key])
                finished(job.label)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


# Not concurrent.futures: with a task a process, Python 3.11 can hang or fail in a thread when a run has failed.
def _start(job: _Job) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(send, job.work, job.arguments), daemon=True)
    process.start()
    send.close()
    return receive, process


def _work(send: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    try:
        send.send((work(*arguments), None))
    except Exception as error:
        send.send((None, f"{type(error).__name__}: {error}"))
        raise


def _result(receive: Connection, process: BaseProcess, label: str) -> Any:
    try:
        value, error = receive.recv()
    except EOFError:
        value, error = None, "its process was killed; is there enough memory for so many workers?"
    process.join()
    receive.close()
    if error:
        raise RuntimeError(f"{label}: {error} (exit code {process.exitcode})")
    return value


def _reference(world: str, seed: int, impressions: int) -> dict[str, Any]:
    reference = Traffic(WORLDS[world], seed, impressions).reference()
    return {"best": reference.best, "uniform": reference.uniform}


def _play(run: Run) -> dict[str, Any]:
    return play(run).to_json()
