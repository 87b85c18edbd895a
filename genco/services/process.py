"""Child processes that never outlive their owner.

The rule: whatever ends this process (return, exception, `kill -9`), its children end too. A clean end goes through
`stop()`; for the rest the kernel sends each child its death signal (Linux, see `die_with_parent.py`).

The kernel ties a child to the *thread* that started it: a child dies when that thread ends. So start children from the
main thread or another one that lives as long as they should; `Supervisor` starts its children from its own thread.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

LOOPBACK = "127.0.0.1"
READY_POLL_SECONDS = 0.02
LOG_TAIL_BYTES = 64 * 1024
WRAPPER = Path(__file__).with_name("die_with_parent.py")


class ServiceError(RuntimeError):
    """A local service could not be started or used; the message is the one line that the user reads."""


def free_port() -> int:
    """Return a free TCP port of the loopback interface, below the range that outgoing connections take theirs from.

    A port from that range (what binding port 0 gives) can be lost while a broker restarts: a client that keeps
    reconnecting to it gets, sooner or later, the same number as its own and connects to itself.

    Raises:
        ServiceError: If fifty random ports in a row are taken.
    """
    for _ in range(50):
        port = 20_000 + secrets.randbelow(12_000)
        if _is_free(port):
            return port
    raise ServiceError("found no free TCP port between 20000 and 32000: stop some of the programs that listen there")


def require_free_port(port: int, service: str) -> None:
    """Refuse a port that somebody listens on, whose answers would be taken for those of the new service.

    Raises:
        ServiceError: If the port is taken.
    """
    if not _is_free(port):
        raise ServiceError(f"{service} needs port {port} of {LOOPBACK}, which is taken: stop what listens there")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # Closed connections of an earlier run do not count.
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


class ManagedProcess:
    """One child process in a session of its own, with its output in a log file.

    Its own session keeps Ctrl+C of the terminal away from it, so the owner decides the order of a shutdown. Whatever
    the child has started and left behind in its process group is killed when the child has ended.

    Args:
        name: What messages call it.
        argv: Program (a path, or a name looked up on PATH) and arguments.
        log_path: File that standard output and standard error are appended to.
        env: Variables set on top of this process's environment.
        cwd: Working directory; this process's own by default.
        hold_stdin: Give it a pipe as standard input that ends with this process; otherwise it reads nothing.
        parent_death_signal: What the kernel sends it when the starting thread dies.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        hold_stdin: bool = False,
        parent_death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.log_path = log_path
        self._env = {**os.environ, **(env or {})}
        self._cwd = cwd
        self._stdin = subprocess.PIPE if hold_stdin else subprocess.DEVNULL
        self._parent_death_signal = parent_death_signal
        self._popen: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()  # Only its holder may reap, so a signal cannot meet a number used again.

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the program; call it from a thread that lives as long as the child should.

        Raises:
            ServiceError: If it runs already, or there is no such program.
        """
        if self.running:
            raise ServiceError(f"{self.name} is already running with process id {self.pid}: stop it first")
        program, *arguments = self.argv
        path = shutil.which(program, path=self._env.get("PATH"))
        if path is None:
            raise ServiceError(f"cannot start {self.name}: there is no program {program}, or it may not be executed")
        wrapper = [sys.executable, "-I", "-S", str(WRAPPER), str(os.getpid()), str(int(self._parent_death_signal))]
        with self.log_path.open("ab") as log:
            self._popen = subprocess.Popen(
                [*wrapper, path, *arguments],
                stdin=self._stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the child, also after its end.

        Raises:
            ServiceError: If it was never started.
        """
        if self._popen is None:
            raise ServiceError(f"{self.name} has no process id: it was not started")
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._popen is not None and self.poll() is None

    def poll(self) -> int | None:
        """Return the exit code (minus the signal number after a signal), or None while it runs or before its start."""
        with self._lock:
            popen = self._popen
            if popen is None or popen.returncode is not None:
                return None if popen is None else popen.returncode
            if os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return None
            # Dead and not yet reaped: nobody else can have its number, so this meets only what it left behind.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(popen.pid, signal.SIGKILL)
            code = popen.wait()
            if popen.stdin is not None:
                popen.stdin.close()
            return code

    def wait(self, timeout: float) -> int | None:
        """Wait for its end, `timeout` seconds at most, and return what `poll` does."""
        deadline = time.monotonic() + timeout
        while self.running and time.monotonic() < deadline:
            time.sleep(READY_POLL_SECONDS)
        return self.poll()

    def wait_ready(self, is_ready: Callable[[], bool], timeout: float) -> None:
        """Return as soon as `is_ready()` says so.

        Raises:
            ServiceError: If the process ends first, or `timeout` seconds pass; its last lines are in the message.
        """
        deadline = time.monotonic() + timeout
        while not is_ready():
            code = self.poll()
            if code is not None:
                raise ServiceError(f"{self.name} ended with code {code} before it was ready; it said: {self.said()}")
            if time.monotonic() > deadline:
                raise ServiceError(f"{self.name} was not ready after {timeout:g} s; it said: {self.said()}")
            time.sleep(READY_POLL_SECONDS)

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        with self._lock:
            if self.running:
                os.kill(self.pid, number)

    def stop(self, grace: float = 5.0) -> int | None:
        """Ask it to end (SIGTERM), kill it and its group after `grace` seconds, and return its exit code."""
        self.send_signal(signal.SIGTERM)
        self.wait(grace)
        return self.kill()

    def kill(self) -> int | None:
        """End it and what it has started at once (SIGKILL) and return its exit code."""
        self.send_signal(signal.SIGKILL)
        return self.wait(timeout=10.0)

    def last_lines(self, count: int = 10) -> list[str]:
        """Return the last lines of its log that are not blank, oldest first."""
        if not self.log_path.exists():
            return []
        with self.log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-count:]

    def said(self) -> str:
        """Return the end of its log in one line, for messages."""
        # Frames of Java stack traces push the reason out of a short tail.
        lines = [line.strip() for line in self.last_lines(200) if not line.lstrip().startswith("at ")]
        return " | ".join(lines[-4:]) or "nothing"
