"""The watchdog ends a process whose signs of life are overdue, and no other."""

import logging
import threading
from dataclasses import dataclass, field

import pytest

import streams.watchdog as module
from streams.watchdog import EXIT_STALLED, Watchdog


@dataclass
class Process:
    """A clock that a test sets, and the exit codes of what was ended."""

    now: float = 100.0
    codes: list[int] = field(default_factory=list)

    def watchdog(self, timeout_s: float = 10.0) -> Watchdog:
        return Watchdog(timeout_s, end=self.codes.append, clock=lambda: self.now)


def test_sign_that_never_came_is_not_expected() -> None:
    process = Process()
    watchdog = process.watchdog()
    process.now += 10**6
    watchdog.look()
    assert watchdog.overdue() == {}
    assert process.codes == []


def test_sign_in_time_keeps_the_process_alive() -> None:
    process = Process()
    watchdog = process.watchdog()
    for _ in range(5):
        watchdog.sign("commits")
        process.now += 10.0
        watchdog.look()
    assert process.codes == []


def test_overdue_sign_ends_the_process_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    process = Process()
    watchdog = process.watchdog()
    watchdog.sign("commits")
    process.now += 8.0
    watchdog.sign("fetches")
    process.now += 2.25
    assert watchdog.overdue() == {"commits": 10.25}
    with caplog.at_level(logging.CRITICAL):
        watchdog.look()
    assert process.codes == [EXIT_STALLED]
    (logged,) = caplog.records
    assert logged.__dict__["overdue_seconds"] == {"commits": 10.2}


def test_other_signs_do_not_stand_in_for_the_overdue_one() -> None:
    process = Process()
    watchdog = process.watchdog()
    watchdog.sign("event loop")
    for _ in range(3):
        process.now += 5.0
        watchdog.sign("commits")
    watchdog.look()
    assert process.codes == [EXIT_STALLED]


def test_thread_ends_the_process_though_nothing_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.001)
    ended = threading.Event()
    now = [0.0]
    watchdog = Watchdog(10.0, end=lambda code: ended.set(), clock=lambda: now[0])
    watchdog.sign("event loop")
    watchdog.start()
    assert not ended.wait(0.05)
    now[0] = 11.0
    assert ended.wait(10.0)
    watchdog.stop()
    watchdog._thread.join(10.0)
    assert not watchdog._thread.is_alive()


def test_stopped_watchdog_has_no_thread_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.001)
    watchdog = Process().watchdog()
    watchdog.start()
    assert watchdog._thread.is_alive()
    watchdog.stop()
    watchdog._thread.join(10.0)
    assert not watchdog._thread.is_alive()
