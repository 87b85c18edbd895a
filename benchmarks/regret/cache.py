"""Results that are kept on disk, so that a run is never repeated for nothing.

A result is kept under a hash of all that decides it: the world's configuration, the policy, seeds, length, and the
sources of the runner, the world and the policy. Of the sources counts what is executed, not comments or docstrings.
Each result is a small JSON file; a folder may be shared by any number of processes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache as remember
from pathlib import Path
from typing import Any, Final

from benchmarks.regret.policies import REGISTRY
from benchmarks.regret.run import Run
from benchmarks.regret.worlds import BATCH, RATE, WORLDS

FORMAT: Final = 1
ROOT: Final = Path(__file__).resolve().parents[2]
_WORLD: Final = ("genco.world", "genco.world_config", "benchmarks.regret.traffic")
_RUNNER: Final = ("benchmarks.regret.run", "benchmarks.regret.labels", "benchmarks.regret.policies.base")
_SHARED: Final = tuple(f"benchmarks.regret.policies.{name}" for name in ("content", "diagonal", "search"))


def default_folder() -> Path:
    """Return a folder in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "genco" / "regret"


class ResultCache:
    """A folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Any | None:
        """Return what was kept under a key, or None; a file that cannot be read counts as none."""
        try:
            return json.loads(self._path(key).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value under a key; readers see all of it or nothing."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(value), "utf-8")
        unfinished.replace(path)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def reference_key(world: str, seed: int, impressions: int) -> str:
    """Return the key of what best and uniform play get."""
    return _key("reference", _world(world), seed, impressions, source_version(_WORLD))


def run_key(run: Run) -> str:
    """Return the key of a run's outcome."""
    entry = REGISTRY[run.policy]
    own = f"benchmarks.regret.policies.{entry.module}"
    sources = source_version((*_WORLD, *_RUNNER, *_SHARED, own, *entry.sources))
    return _key("run", _world(run.world), run.policy, entry.name, run.seed, run.repeat, run.impressions, sources)


def _world(name: str) -> dict[str, Any]:
    return asdict(WORLDS[name]) | {"batch": BATCH, "rate": RATE}


def _key(kind: str, *parts: Any) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, kind, *parts], sort_keys=True).encode()).hexdigest()
    return f"{kind}-{digest[:32]}"


def source_version(modules: Sequence[str]) -> str:
    """Return a hash of what is executed in modules of ours, and in all modules of packages.

    Raises:
        ValueError: If there is no such module.
    """
    digest = hashlib.sha256()
    for module in modules:
        path = ROOT.joinpath(*module.split("."))
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        if not files or not files[0].is_file():
            raise ValueError(f"{module} is no module below {ROOT}; its sources decide which results are kept")
        for file in files:
            digest.update(f"{file.relative_to(ROOT)} {_executed(file.read_text('utf-8'))}\n".encode())
    return digest.hexdigest()


@remember
def _executed(source: str) -> str:
    """Return a hash of a source without its comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # Strings that stand alone do nothing: docstrings, also those of fields.
            node.body = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
