"""The peers of `genco bench join`, each a process of its own on the same broker: a Faust agent, and Quix Streams."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.broker import BenchmarkBroker
from benchmarks.join_ours import ATTRIBUTION_WINDOW_MS
from benchmarks.processes import Sample, Steady, cpu_seconds, steady, watch
from benchmarks.traffic import Traffic
from genco.services import ManagedProcess

PEER_IMPRESSIONS: Final = "peer-impressions"
PEER_CLICKS: Final = "peer-clicks"
FAUST_OUT: Final = "peer-faust-out"
QUIX_OUT: Final = "peer-quix-out"
PASSED_OUT: Final = "peer-passed-out"
PEER_TOPICS: Final = (PEER_IMPRESSIONS, PEER_CLICKS, FAUST_OUT, QUIX_OUT, PASSED_OUT)

_HERE: Final = Path(__file__).parent
_FAUST: Final = _HERE / "plain_faust.py"
_QUIX: Final = _HERE / "peers" / "quix_join.py"
_REQUIREMENTS: Final = _HERE / "peers" / "requirements.txt"
_ENVIRONMENT: Final = _HERE.parent / ".venv-peers"
_INSTALL_TIMEOUT_S: Final = 600
_POLL_S: Final = 0.25
_OPTIONS: Final = ("-P",)
"""Of Python: this folder is not for the peers to import from."""


class PeerUnavailableError(RuntimeError):
    """A peer cannot be installed here; the message says why."""


@dataclass(frozen=True, slots=True)
class Peers:
    """Runs the peers over one log."""

    broker: BenchmarkBroker
    traffic: Traffic
    directory: Path
    """For their logs and their state."""

    def fill(self) -> None:
        """Write the log as they read it, one event a record."""
        records = self.traffic.single_events(PEER_IMPRESSIONS, PEER_CLICKS)
        self.broker.fill(records, linger_ms=50)
        for topic in (PEER_IMPRESSIONS, PEER_CLICKS):
            self.broker.require_kept(topic, dict.fromkeys(self.broker.ends(topic), 0))

    def faust(self, group: str) -> Steady:
        """Return how fast the agent reads and sends impressions."""
        arguments = [str(_FAUST), self.broker.address, group, PEER_IMPRESSIONS, FAUST_OUT]
        return self._run(
            "the plain Faust agent", Path(sys.executable), group, arguments, self.traffic.options.impressions
        )

    def quix_join(self, python: Path, group: str) -> Steady:
        """Return how fast Quix Streams joins; the unit is an impression, which comes out again with each click."""
        impressions = self.traffic.options.impressions
        joined = int(self.traffic.joined(ATTRIBUTION_WINDOW_MS).sum())
        topics = [PEER_IMPRESSIONS, PEER_CLICKS, QUIX_OUT, str(ATTRIBUTION_WINDOW_MS)]
        found = self._quix("join", python, group, topics, impressions + joined)
        share = impressions / (impressions + joined)
        return Steady(found.rate * share, found.cpu_s, found.done * share, found.seconds)

    def quix_pass_through(self, python: Path, group: str) -> Steady:
        """Return how fast Quix Streams reads and sends impressions."""
        topics = [PEER_IMPRESSIONS, PASSED_OUT]
        return self._quix("pass", python, group, topics, self.traffic.options.impressions)

    def _quix(self, mode: str, python: Path, group: str, topics: Sequence[str], expected: int) -> Steady:
        state = self.directory / f"{group}-state"
        arguments = [str(_QUIX), mode, self.broker.address, group, str(state), *topics]
        try:
            return self._run(
                "Quix Streams", python, group, arguments, expected, out=QUIX_OUT if mode == "join" else PASSED_OUT
            )
        finally:
            shutil.rmtree(state, ignore_errors=True)

    def _run(
        self, name: str, python: Path, group: str, arguments: Sequence[str], expected: int, out: str = FAUST_OUT
    ) -> Steady:
        """Let a peer work until its output topic has grown by what is expected."""
        before = self.broker.size(out)
        process = ManagedProcess(
            name,
            [str(python), *_OPTIONS, *arguments],
            log_path=self.directory / f"{group}.log",
            env={"OMP_NUM_THREADS": "1"},
            cwd=self.directory,
        )

        def sample() -> Sample:
            at_s = time.monotonic()
            return Sample(at_s, self.broker.size(out) - before, cpu_seconds(process.pid))

        with process:
            samples = watch(process, sample, expected, every_s=_POLL_S)
            process.kill()
        return steady(samples)


def quix_python(say: Callable[[str], None]) -> Path:
    """Return the Python of the peers' environment, and make the environment first if there is none.

    Raises:
        PeerUnavailableError: If it cannot be made, for want of a network for instance.
    """
    python = _ENVIRONMENT / "bin" / "python"
    stamp = _ENVIRONMENT / "requirements.txt"
    if stamp.is_file() and stamp.read_text() == _REQUIREMENTS.read_text():
        return python
    say(f"installing Quix Streams into {_ENVIRONMENT.name}, once")
    _call([sys.executable, "-m", "venv", "--clear", str(_ENVIRONMENT)])
    _call([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(_REQUIREMENTS)])
    shutil.copyfile(_REQUIREMENTS, stamp)
    return python


def _call(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailableError(f"Quix Streams could not be installed: {error}") from error
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip().splitlines()[-1:] or ["nothing"]
        raise PeerUnavailableError(f"Quix Streams could not be installed: {said[0]}")
