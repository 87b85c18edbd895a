"""Helpers for tests of processes: is one alive, wait for something, run a small parent."""

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

with warnings.catch_warnings():
    # kafka-python 3.0 reads its schemas through importlib.resources.read_text, deprecated in Python 3.11.
    warnings.simplefilter("ignore", DeprecationWarning)
    import kafka  # noqa: F401

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def is_alive() -> Callable[[int], bool]:
    """Whether a process runs; a zombie that its new parent has not reaped does not."""

    def check(pid: int) -> bool:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
        return bool(state.strip()) and not state.strip().startswith("Z")

    return check


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], object]], None]:
    def wait(condition: Callable[[], object], timeout: float = 15.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not true after {timeout} s"
            time.sleep(0.02)

    return wait


@pytest.fixture
def temporary_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's services, and those of its child processes, make their private directories."""
    root = tmp_path / "temporary"
    root.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(root))
    monkeypatch.setenv("TMPDIR", str(root))
    return root


@pytest.fixture
def start_parent(temporary_root: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a Python process that runs the given code with this repository importable."""
    parents: list[subprocess.Popen[str]] = []

    def start(code: str) -> subprocess.Popen[str]:
        parent = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        parents.append(parent)
        return parent

    yield start
    for parent in parents:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()
