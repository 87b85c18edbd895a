"""A managed process is ready, ends and fails as its owner wants to know it, and ends with its owner."""

import os
import signal
import socket
import sys
import time

import pytest

from genco.services import ManagedProcess, ServiceError, free_port
from genco.services.process import require_free_port

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


def test_process_stopped_ends_with_its_own_code(tmp_path, wait_until, is_alive):
    process = ManagedProcess("polite", SAY_GOODBYE, log_path=tmp_path / "log")
    process.start()
    wait_until(lambda: process.last_lines() == ["ready"])
    assert is_alive(process.pid)
    assert process.stop() == 0
    assert process.last_lines() == ["ready", "goodbye"]
    assert not is_alive(process.pid)


def test_process_ignoring_sigterm_is_killed_after_grace(tmp_path, wait_until):
    process = ManagedProcess("stubborn", IGNORE_SIGTERM, log_path=tmp_path / "log")
    process.start()
    wait_until(lambda: process.last_lines() == ["ready"])
    started = time.monotonic()
    assert process.stop(grace=0.3) == -signal.SIGKILL
    assert 0.3 <= time.monotonic() - started < 5


def test_process_killed_takes_its_own_children_along(tmp_path, wait_until, is_alive):
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    process = ManagedProcess("family", [sys.executable, "-c", code], log_path=tmp_path / "log")
    process.start()
    wait_until(process.last_lines)
    grandchild = int(process.last_lines()[0])
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: process.poll() == -signal.SIGKILL)
    wait_until(lambda: not is_alive(grandchild))


def test_process_started_twice_is_refused(tmp_path):
    with (
        ManagedProcess("sleeper", SLEEP, log_path=tmp_path / "log") as process,
        pytest.raises(ServiceError, match="already running"),
    ):
        process.start()


def test_missing_program_is_named(tmp_path):
    process = ManagedProcess("ghost", ["no-such-program"], log_path=tmp_path / "log")
    with pytest.raises(ServiceError, match="cannot start ghost: there is no program no-such-program"):
        process.start()


def test_process_that_ends_before_it_is_ready_tells_its_last_words(tmp_path):
    process = ManagedProcess("short", exits_with(3), log_path=tmp_path / "log")
    process.start()
    with pytest.raises(ServiceError, match="short ended with code 3 before it was ready; it said: reason of 3"):
        process.wait_ready(lambda: False, timeout=20)


def test_process_that_is_never_ready_is_refused_after_the_timeout(tmp_path):
    with (
        ManagedProcess("slow", SLEEP, log_path=tmp_path / "log") as process,
        pytest.raises(ServiceError, match=r"slow was not ready after 0\.1 s"),
    ):
        process.wait_ready(lambda: False, timeout=0.1)


def test_free_port_can_be_bound_and_taken_port_is_refused():
    port = free_port()
    require_free_port(port, "somebody")
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ServiceError, match=f"needs port {port} .* is taken"):
        require_free_port(port, "somebody")


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_process_dies_when_its_parent_is_killed(tmp_path, start_parent, wait_until, is_alive):
    parent = start_parent(f"""
import time
from pathlib import Path
from genco.services import ManagedProcess
process = ManagedProcess("stubborn", {IGNORE_SIGTERM!r}, log_path=Path({str(tmp_path / "log")!r}))
process.start()
process.wait_ready(lambda: process.last_lines() == ["ready"], 20)
print(process.pid, flush=True)
time.sleep(600)
""")
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    wait_until(lambda: not is_alive(child))
