"""What the local servers have in common: a private directory, a child process, and a clean end."""

import shutil
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

from genco.services.process import ManagedProcess, ServiceError


class Service(ABC):
    """A local server for demos and tests: `start` it, hand out `client_settings()`, `stop` it.

    Its files lie in a private temporary directory that `stop` removes. `kill` and `start` again is the crash of a fault
    test: same directory, same port where the server lets us choose it.
    """

    def __init__(self, name: str, *, ready_timeout: float, grace: float) -> None:
        self.name = name
        self._ready_timeout = ready_timeout
        self._grace = grace
        self._directory: Path | None = None
        self._process: ManagedProcess | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abstractmethod
    def client_settings(self) -> dict[str, str]:
        """Return the environment variables that lead the other processes to this service."""

    @abstractmethod
    def _launch(self, directory: Path) -> ManagedProcess:
        """Write what the server needs into the private directory and return its process, not started."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Say whether the server answers."""

    def start(self) -> None:
        """Start the server and return when it answers; call it from a thread that lives as long as the server should.

        Raises:
            ServiceError: If it cannot be started, runs already, or does not answer in time. Nothing is left behind.
        """
        if self.running:
            raise ServiceError(f"{self.name} is already running: stop it first")
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="genco-"))
        try:
            self._process = self._launch(self._directory)
            self._process.start()
            self._process.wait_ready(self._is_ready, self._ready_timeout)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and remove its private directory; does nothing when it does not run."""
        if self._process is not None:
            self._process.stop(self._grace)
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def kill(self) -> None:
        """Crash the server (SIGKILL) and keep its files, so that `start` brings it back."""
        if self._process is not None:
            self._process.kill()

    def restart(self) -> None:
        """Stop the server in good order and start it again on the same files.

        Raises:
            ServiceError: If it is not started, or does not come back.
        """
        self._started_process().stop(self._grace)
        self.start()

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.running

    @property
    def pid(self) -> int:
        """Process id of the server.

        Raises:
            ServiceError: If it is not started.
        """
        return self._started_process().pid

    def last_lines(self, count: int = 10) -> list[str]:
        """Return the last lines of the server's log."""
        return self._started_process().last_lines(count)

    def _started_process(self) -> ManagedProcess:
        if self._process is None:
            raise ServiceError(f"{self.name} is not running: call start() first")
        return self._process
