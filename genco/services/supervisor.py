"""Keep the processes of a demo running: restart what dies, give up on wrong settings, stop all in order."""

import atexit
import logging
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from genco.services.process import ManagedProcess, ServiceError

logger = logging.getLogger(__name__)

EXIT_CONFIGURATION = 78
"""EX_CONFIG of sysexits.h: the settings are wrong, so starting again cannot help."""
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildCommand:
    """A program that a `Supervisor` keeps running."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables set on top of the supervisor's environment."""
    may_finish: bool = False
    """Whether exit code 0 means that its work is done; otherwise it is restarted after that too."""


@dataclass(slots=True)
class _Child:
    """What the supervisor knows about one command."""

    command: ChildCommand
    process: ManagedProcess
    backoff: float
    started_at: float = 0.0
    restart_at: float | None = None
    finished: bool = False
    restarts: int = 0


class Supervisor:
    """Keep named commands running; restart one that dies, later each time, and give up on wrong settings.

    A child that exits with 78 (EX_CONFIG) would fail again for ever: it stops all of them and is told in `failure`.
    All public methods may be called from any thread. One thread of its own starts, watches and stops the children.

    Args:
        commands: What to run, in start order.
        log_directory: Where each child's output goes, to `<name>.log`.
        initial_backoff: Seconds before the first restart; doubled for each further one.
        max_backoff: Seconds that no restart waits longer than.
        healthy_after: Seconds of life after which a child's backoff starts anew.

    Example:
        supervisor = Supervisor([ChildCommand(name="join", argv=["genco", "join"])], log_directory=logs)
        with supervisor:
            supervisor.wait(60.0)
    """

    def __init__(
        self,
        commands: Sequence[ChildCommand],
        *,
        log_directory: Path,
        initial_backoff: float = 0.5,
        max_backoff: float = 10.0,
        healthy_after: float = 30.0,
    ) -> None:
        names = [command.name for command in commands]
        if len(set(names)) != len(names):
            raise ValueError(f"names of supervised commands are {names}; each must occur once")
        self._initial_backoff = initial_backoff
        self._max_backoff = max_backoff
        self._healthy_after = healthy_after
        self._children = {
            command.name: _Child(
                command=command,
                process=ManagedProcess(
                    command.name, command.argv, log_path=log_directory / f"{command.name}.log", env=command.env
                ),
                backoff=initial_backoff,
            )
            for command in commands
        }
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._stop_order: Sequence[str] = tuple(reversed(names))
        self._grace = 10.0
        self._stop_requested = threading.Event()
        self._all_started = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start all commands; a supervisor runs once.

        Raises:
            ServiceError: If it was started before, or one of the programs does not exist; none is left running.
        """
        if self._thread is not None:
            raise ServiceError("this supervisor was started before: make a new one")
        # A daemon, so that an owner who forgot stop() can end; atexit then still gives the children their SIGTERM.
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        atexit.register(self.stop)
        self._thread.start()
        self._all_started.wait()
        if self._failure is not None:
            self._thread.join()
            raise ServiceError(self._failure)

    def stop(self, order: Sequence[str] | None = None, grace: float = 10.0) -> None:
        """Send SIGTERM to all children in `order`, wait `grace` seconds in total, kill those that are left.

        Args:
            order: Names, first to stop first; those not named follow, last started first.
            grace: Seconds that all of them together have to end.

        Raises:
            ValueError: If `order` names a command that there is not.
        """
        unknown = set(order or ()) - set(self._children)
        if unknown:
            raise ValueError(f"stop order names {sorted(unknown)}; the commands are {list(self._children)}")
        with self._lock:
            named = list(order or ())
            self._stop_order = [*named, *(name for name in reversed(self._children) if name not in named)]
            self._grace = grace
        self._stop_requested.set()
        if self._thread is not None:
            self._thread.join()
        atexit.unregister(self.stop)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all children have ended (stop, failure, or all finished) and say whether they have."""
        return self._ended.wait(timeout)

    @property
    def failure(self) -> str | None:
        """Why the supervisor gave up, in one line; None while all is well."""
        return self._failure

    @property
    def restarts(self) -> dict[str, int]:
        """Number of restarts of each command."""
        with self._lock:
            return {name: child.restarts for name, child in self._children.items()}

    @property
    def running(self) -> dict[str, bool]:
        """Whether each command has a living process at this moment."""
        with self._lock:
            return {name: child.process.running for name, child in self._children.items()}

    def pid(self, name: str) -> int:
        """Return the process id of the newest process of a command."""
        return self._children[name].process.pid

    def last_lines(self, name: str, count: int = 10) -> list[str]:
        """Return the last lines of a command's log."""
        return self._children[name].process.last_lines(count)

    def _run(self) -> None:
        try:
            for child in self._children.values():
                self._launch(child)
            self._all_started.set()
            while not self._stop_requested.wait(POLL_SECONDS) and self._failure is None:
                with self._lock:
                    for child in self._children.values():
                        self._check(child, time.monotonic())
                    if all(child.finished for child in self._children.values()):
                        break
        except ServiceError as error:
            self._failure = str(error)
        finally:
            self._stop_children()
            self._ended.set()
            self._all_started.set()

    def _launch(self, child: _Child) -> None:
        child.restart_at = None
        child.started_at = time.monotonic()
        child.process.start()

    def _check(self, child: _Child, now: float) -> None:
        """Notice the child's death, or restart it when its time has come."""
        if child.finished:
            return
        if child.restart_at is not None:
            if now >= child.restart_at:
                child.restarts += 1
                self._launch(child)
            return
        code = child.process.poll()
        if code is None:
            return
        if code == EXIT_CONFIGURATION:
            said = " | ".join(child.process.last_lines(3))
            self._failure = f"{child.command.name} refuses its settings (exit code {code}): {said}"
        elif code == 0 and child.command.may_finish:
            child.finished = True
        else:
            self._plan_restart(child, code, now)

    def _plan_restart(self, child: _Child, code: int, now: float) -> None:
        if now - child.started_at >= self._healthy_after:
            child.backoff = self._initial_backoff
        child.restart_at = now + child.backoff
        logger.warning(
            "child process died, restarting it",
            extra={"child": child.command.name, "exit_code": code, "restart_in_seconds": child.backoff},
        )
        child.backoff = min(2 * child.backoff, self._max_backoff)

    def _stop_children(self) -> None:
        with self._lock:
            processes = [self._children[name].process for name in self._stop_order]
            deadline = time.monotonic() + self._grace
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
