"""Watch a process at its work: how far it is, what it costs, and when it is done or will never be."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.broker import BenchmarkError
from genco.services import ManagedProcess

STALL_S: Final = 60.0
"""A process without progress for so long has failed."""
_LOCAL: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Sample:
    """How far a process is."""

    at_s: float
    done: float
    """Units of work that are finished, as the broker sees it."""
    cpu_s: float | None = None
    """Processor time it has used; None where there is no /proc."""
    open_impressions: float = 0.0
    has_read: bool = True
    """Whether the process has read anything yet."""


@dataclass(frozen=True, slots=True)
class Steady:
    """Between the first finished work that was seen and the last."""

    rate: float
    """Units a second."""
    cpu_s: float | None
    done: float
    seconds: float


def watch(
    process: ManagedProcess,
    sample: Callable[[], Sample | None],
    until: float,
    *,
    every_s: float,
    stall_s: float = STALL_S,
) -> list[Sample]:
    """Take samples until so much is done.

    Args:
        process: Which one; it must go on running.
        sample: Takes a sample; None while there is nothing to see yet.
        until: Units of work.
        every_s: Time between samples.
        stall_s: Time without progress after which it has failed.

    Raises:
        BenchmarkError: If the process ends, or nothing moves any more; with its last words.
    """
    samples: list[Sample] = []
    moved_s = time.monotonic()
    while not samples or samples[-1].done < until:
        taken = sample()
        if taken is not None:
            if not samples or (taken.done, taken.open_impressions) != (samples[-1].done, samples[-1].open_impressions):
                moved_s = time.monotonic()
            samples.append(taken)
        if not process.running:
            raise BenchmarkError(f"{process.name} ended with code {process.poll()}; it said: {_last_words(process)}")
        if time.monotonic() - moved_s > stall_s:
            done = samples[-1].done if samples else 0
            raise BenchmarkError(
                f"{process.name} made no progress for {stall_s:.0f} s, {done:,.0f} of {until:,.0f} done; "
                f"it said: {_last_words(process)}"
            )
        time.sleep(every_s)
    return samples


def _last_words(process: ManagedProcess) -> str:
    """Return the last error in the log of a process, which others may have followed, else its end."""
    errors = [line for line in process.last_lines(100) if "rror" in line]
    return errors[-1][:1000] if errors else process.said()


def steady(samples: Sequence[Sample]) -> Steady:
    """Return the rate between the first sample with finished work and the first with all of it.

    If those are one, so that nothing is known between them, it is the rate since the first sample, which is lower.

    Raises:
        BenchmarkError: If all of it was finished at the first sample.
    """
    first = next(sample for sample in samples if sample.done > 0)
    last = next(sample for sample in samples if sample.done == samples[-1].done)
    if first is last:
        first = samples[0]
    seconds, done = last.at_s - first.at_s, last.done - first.done
    if done <= 0:
        raise BenchmarkError("all was done at the first look at it; use more --impressions")
    cpu_s = None if first.cpu_s is None or last.cpu_s is None else last.cpu_s - first.cpu_s
    return Steady(done / seconds, cpu_s, done, seconds)


def cpu_seconds(pid: int) -> float | None:
    """Return the processor time that a process has used; None where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def scrape(port: int) -> dict[str, float] | None:
    """Return the values of /metrics by name and labels; None while nobody answers."""
    try:
        with _LOCAL.open(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as answer:
            text = answer.read().decode()
    except OSError:
        return None
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}
