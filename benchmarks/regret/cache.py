"""Results that are kept on disk, so that a run is never repeated for nothing.

A result is kept under a hash of all that decides it: the world's configuration, the policy, seeds, length, and the
sources of the runner, the world and the policy with all that they import of ours. Of the sources counts what is
executed, not comments or docstrings.
Each result is a small JSON file; a folder may be shared by any number of processes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache as remember
from pathlib import Path
from typing import Any, Final

from benchmarks.regret.policies import ENTRIES
from benchmarks.regret.run import Run
from benchmarks.regret.worlds import BATCH, RATE, WORLDS

FORMAT: Final = 1
ROOT: Final = Path(__file__).resolve().parents[2]
_APART: Final = ("benchmarks.regret.policies", "benchmarks.regret.worlds")
"""Lists of policies and worlds: of these only the entry in question counts, so others may be added."""


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
    return _key("reference", _world(world), seed, impressions, source_version("benchmarks.regret.traffic"))


def run_key(run: Run) -> str:
    """Return the key of a run's outcome."""
    entry = ENTRIES[run.policy]
    sources = [source_version(m) for m in ("benchmarks.regret.run", f"benchmarks.regret.policies.{entry.module}")]
    return _key("run", _world(run.world), entry.name, run.seed, run.repeat, run.impressions, *sources)


def _world(name: str) -> dict[str, Any]:
    return asdict(WORLDS[name]) | {"batch": BATCH, "rate": RATE}


def _key(kind: str, *parts: Any) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, kind, *parts], sort_keys=True).encode()).hexdigest()
    return f"{kind}-{digest[:32]}"


@remember
def source_version(module: str) -> str:
    """Return a hash of what is executed in a module and in all of ours that it imports, directly or not.

    Raises:
        ValueError: If there is no such module.
    """
    if _path(module) is None:
        raise ValueError(f"{module} is no module below {ROOT}; its sources decide which results are kept")
    found, waiting = dict[str, str](), [module]
    while waiting:
        name = waiting.pop()
        path = _path(name)
        if path is None or name in found or name in _APART:
            continue
        tree = ast.parse(path.read_text("utf-8"))
        found[name] = _executed(tree)
        waiting += _imported(tree)
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def _path(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a tree imports anywhere; some of the names may be none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _executed(tree: ast.Module) -> str:
    """Return a hash of a tree without its docstrings, which it is relieved of."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # Strings that stand alone do nothing: docstrings, also those of fields.
            node.body = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
