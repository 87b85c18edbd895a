"""What no update may do to the model, and what becomes of one that would.

A quarantined update is one line of JSON beside the checkpoints: its number, its bounds in `examples`, and why. The
examples stay where they are, in the topic and the archive, so the line is enough to find them, and the file is small.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

from learner.online import OnlineLearner

logger = logging.getLogger(__name__)

UNLEARNABLE: Final = (ArithmeticError, ValueError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""What examples can cause. Other errors are those of the program or the machine, and repeating may help."""
FILE: Final = "quarantine.ndjson"
MAX_LINES: Final = 1_000
"""Older lines are dropped."""


def require_finite(learner: OnlineLearner) -> None:
    """Check what an update has left behind.

    Raises:
        FloatingPointError: If a number of reward model or generator is not finite.
    """
    parts = {"reward_model": learner.reward_model.tensors(), "generator": learner.generator.tensors()}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise FloatingPointError(f"{part}.{name} holds numbers that are not finite")


class Quarantine:
    """The updates that were left out, newest last."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE

    def add(self, number: int, where: Mapping[str, object], error: Exception) -> None:
        """Note an update; adding the same one again, after a crash, changes nothing.

        Args:
            number: Which.
            where: JSON-able, how to find its examples.
            error: Why.
        """
        reason = f"{type(error).__name__}: {error}"
        logger.error("an update was left out", extra={"update": number, "reason": reason})
        line = {"update": number, **where, "reason": reason[:1_000]}
        lines = [kept for kept in self.lines() if kept["update"] != number]
        self._write([*lines, line][-MAX_LINES:])

    def lines(self) -> list[dict[str, object]]:
        """Return what was noted."""
        try:
            text = self._path.read_text("utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines()]

    def _write(self, lines: list[dict[str, object]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        temporary.rename(self._path)
