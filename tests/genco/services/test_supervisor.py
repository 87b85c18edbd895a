"""The supervisor restarts what died, and nothing that cannot work; all of it ends with its owner."""

import os
import signal
import sys
import threading
import time

import pytest

from genco.services import ChildCommand, ManagedProcess, ServiceError, Supervisor

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
IGNORE_SIGTERM = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)",
]
SAY_GOODBYE = [
    sys.executable,
    "-c",
    """
import signal, sys, time
def end(*_):
    print("goodbye", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(600)
""",
]


def exits_with(code):
    return [sys.executable, "-c", f"print('reason of {code}'); raise SystemExit({code})"]


@pytest.fixture
def supervise(tmp_path):
    supervisors = []

    def start(*commands, **settings):
        supervisor = Supervisor(commands, log_directory=tmp_path, **settings)
        supervisors.append(supervisor)
        supervisor.start()
        return supervisor

    yield start
    for supervisor in supervisors:
        supervisor.stop(grace=0.1)


def test_supervisor_restarts_killed_child(supervise, wait_until, is_alive):
    supervisor = supervise(
        ChildCommand(name="victim", argv=SLEEP), ChildCommand(name="bystander", argv=SLEEP), initial_backoff=0.1
    )
    victim, bystander = supervisor.pid("victim"), supervisor.pid("bystander")
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: supervisor.restarts == {"victim": 1, "bystander": 0})
    wait_until(lambda: supervisor.running["victim"])
    assert supervisor.pid("victim") != victim
    assert supervisor.pid("bystander") == bystander
    supervisor.stop()
    assert not is_alive(supervisor.pid("victim"))
    assert not is_alive(bystander)
    assert supervisor.failure is None


def test_supervisor_restarts_child_that_ends_without_leave(supervise, wait_until):
    supervisor = supervise(ChildCommand(name="quitter", argv=exits_with(0)), initial_backoff=0.05)
    wait_until(lambda: supervisor.restarts["quitter"] >= 1)


def announced_backoffs(caplog):
    return [record.restart_in_seconds for record in caplog.records if hasattr(record, "restart_in_seconds")]


def test_supervisor_waits_longer_before_each_restart_up_to_the_limit(supervise, wait_until, caplog):
    code = "import time; print(time.monotonic(), flush=True); raise SystemExit(1)"
    supervisor = supervise(
        ChildCommand(name="crasher", argv=[sys.executable, "-c", code]), initial_backoff=0.2, max_backoff=0.5
    )
    wait_until(lambda: len(supervisor.last_lines("crasher")) >= 4)
    times = [float(line) for line in supervisor.last_lines("crasher")]
    waits = announced_backoffs(caplog)[:3]
    assert waits == [0.2, 0.4, 0.5]
    assert all(later - earlier >= wait for earlier, later, wait in zip(times, times[1:], waits, strict=False))


def test_supervisor_forgets_backoff_of_child_that_was_healthy(supervise, wait_until, caplog):
    supervisor = supervise(ChildCommand(name="crasher", argv=exits_with(1)), initial_backoff=0.1, healthy_after=0.0)
    wait_until(lambda: supervisor.restarts["crasher"] >= 3)
    assert announced_backoffs(caplog)[:3] == [0.1, 0.1, 0.1]
    assert supervisor.failure is None


def test_supervisor_stops_all_on_configuration_error(supervise, is_alive):
    supervisor = supervise(ChildCommand(name="good", argv=SLEEP), ChildCommand(name="bad", argv=exits_with(78)))
    assert supervisor.wait(20)
    assert supervisor.failure == "bad refuses its settings (exit code 78): reason of 78"
    assert supervisor.restarts == {"good": 0, "bad": 0}
    assert not is_alive(supervisor.pid("good"))


def test_supervisor_ends_when_all_children_have_finished(supervise):
    supervisor = supervise(ChildCommand(name="simulator", argv=exits_with(0), may_finish=True))
    assert supervisor.wait(20)
    assert supervisor.failure is None
    assert supervisor.restarts == {"simulator": 0}


def test_supervisor_with_missing_program_starts_nothing(tmp_path, is_alive):
    commands = [ChildCommand(name="good", argv=SLEEP), ChildCommand(name="ghost", argv=["no-such-program"])]
    supervisor = Supervisor(commands, log_directory=tmp_path)
    with pytest.raises(ServiceError, match="cannot start ghost"):
        supervisor.start()
    assert not is_alive(supervisor.pid("good"))


def test_supervisor_stops_in_the_given_order_then_last_started_first(supervise, monkeypatch):
    asked = []
    original = ManagedProcess.send_signal

    def record(process, number):
        if number == signal.SIGTERM:
            asked.append(process.name)
        original(process, number)

    supervisor = supervise(*(ChildCommand(name=name, argv=SLEEP) for name in "abcd"))
    monkeypatch.setattr(ManagedProcess, "send_signal", record)
    supervisor.stop(order=["b", "d"])
    assert asked == ["b", "d", "c", "a"]


def test_supervisor_refuses_unknown_name_in_stop_order(supervise):
    supervisor = supervise(ChildCommand(name="a", argv=SLEEP))
    with pytest.raises(ValueError, match=r"stop order names \['z'\]; the commands are \['a'\]"):
        supervisor.stop(order=["z"])
    assert supervisor.running == {"a": True}


def test_supervisor_gives_children_grace_and_then_kills(supervise, wait_until, is_alive):
    supervisor = supervise(
        ChildCommand(name="polite", argv=SAY_GOODBYE), ChildCommand(name="stubborn", argv=IGNORE_SIGTERM)
    )
    wait_until(lambda: supervisor.last_lines("polite") and supervisor.last_lines("stubborn"))
    started = time.monotonic()
    supervisor.stop(grace=0.5)
    assert 0.5 <= time.monotonic() - started < 5
    assert supervisor.last_lines("polite") == ["ready", "goodbye"]
    assert not is_alive(supervisor.pid("stubborn"))


def test_supervisor_started_by_short_lived_thread_keeps_its_children(tmp_path, is_alive):
    supervisor = Supervisor([ChildCommand(name="a", argv=SLEEP)], log_directory=tmp_path)
    starter = threading.Thread(target=supervisor.start)
    starter.start()
    starter.join()
    time.sleep(0.3)
    assert is_alive(supervisor.pid("a"))
    assert supervisor.restarts == {"a": 0}
    supervisor.stop()


def test_supervised_command_names_must_differ(tmp_path):
    with pytest.raises(ValueError, match="each must occur once"):
        Supervisor([ChildCommand(name="a", argv=SLEEP)] * 2, log_directory=tmp_path)


def supervising_parent(directory, last_line):
    return f"""
import time
from pathlib import Path
from genco.services import ChildCommand, Supervisor
supervisor = Supervisor([ChildCommand(name="polite", argv={SAY_GOODBYE!r})], log_directory=Path({str(directory)!r}))
supervisor.start()
while not supervisor.last_lines("polite"):
    time.sleep(0.02)
print(supervisor.pid("polite"), flush=True)
{last_line}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_supervised_child_dies_when_the_supervisor_is_killed(tmp_path, start_parent, wait_until, is_alive):
    parent = start_parent(supervising_parent(tmp_path, "time.sleep(600)"))
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    wait_until(lambda: not is_alive(child))


def test_supervised_child_is_asked_to_end_when_the_owner_forgets_to_stop(tmp_path, start_parent, is_alive):
    parent = start_parent(supervising_parent(tmp_path, ""))
    child = int(parent.stdout.readline())
    assert parent.wait(timeout=20) == 0
    assert not is_alive(child)
    assert (tmp_path / "polite.log").read_text() == "ready\ngoodbye\n"
