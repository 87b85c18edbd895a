"""A server as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
NOWHERE = {"GENCO_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1", "GENCO_REDIS_URL": "redis://127.0.0.1:1/0"}


def environment(tmp_path: Path, **settings: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GENCO_")}
    return clean | {
        "PYTHONPATH": str(REPOSITORY),
        "GENCO_SIGNING_KEY": "k" * 32,
        "GENCO_HTTP_PORT": "0",
        "GENCO_LAST_GOOD_DIR": str(tmp_path),
        **settings,
    }


@contextmanager
def server(env: dict[str, str], log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.main"], env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["url"]
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def readiness(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:  # noqa: S310
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return json.load(error)


def wait_until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
