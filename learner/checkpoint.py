"""Checkpoints on disk: one file, complete or not there.

A checkpoint is a safetensors file: the learner's tensors, and its other state as JSON bytes in the tensor `state`. It
is written beside its final name, fsynced and renamed, and its name carries its sha256, so a torn or damaged file is
known before it is read. Offsets inside it say what it has learned; Kafka's committed offsets are only a hint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from learner.crash_points import CrashPoint, Hook, go_on

logger = logging.getLogger(__name__)

KEEP: Final = 3
_NAME: Final = re.compile(r"checkpoint-(\d{12})-([0-9a-f]{16})\.safetensors")
_STATE: Final = "state"


class CheckpointError(RuntimeError):
    """There are checkpoints, but none can be read: starting from nothing would silently forget what was learned."""


def pack(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> bytes:
    """Return tensors (of any names but `state`) and anything that JSON can hold as the bytes of a safetensors file."""
    text = json.dumps(state, separators=(",", ":"), allow_nan=False).encode()
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    packed[_STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return save(packed)


def unpack(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return what `pack` was given.

    Raises:
        SafetensorError: If the bytes are no safetensors file.
        KeyError: If it has no state.
    """
    tensors = load(data)
    return tensors, json.loads(bytes(tensors.pop(_STATE).numpy()))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was saved."""

    number: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one learner, in one directory; the newest few are kept."""

    def __init__(self, directory: Path, *, at: Hook = go_on) -> None:
        """Use a directory, which is created with the first checkpoint; `at` is called at every crash point."""
        self._directory = directory
        self._at = at

    def save(self, number: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint that survives a crash of process and machine.

        Args:
            number: Larger than that of every earlier checkpoint.
            tensors: Any names but `state`.
            state: Anything that JSON can hold.

        Raises:
            OSError: If the disk refuses; the earlier checkpoints are untouched then.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        data = pack(tensors, state)
        name = f"checkpoint-{number:012d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        path = self._directory / name
        temporary = self._directory / f".{name}.{os.getpid()}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._at(CrashPoint.CHECKPOINT_WRITTEN)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._at(CrashPoint.CHECKPOINT_RENAMED)
        _fsync_directory(self._directory)
        # By the time of writing, not by number: after a step back to an older checkpoint, the damaged ones have larger
        # numbers than the good ones that follow.
        for old in sorted((path for _, path in self._found()), key=lambda p: p.stat().st_mtime_ns)[:-KEEP]:
            old.unlink(missing_ok=True)
        return path

    def is_empty(self) -> bool:
        """Tell whether there is no checkpoint, not even a damaged one."""
        return not self._found()

    def load_newest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole, or None if there has never been one.

        Raises:
            CheckpointError: If there are some and all are damaged.
        """
        for abandoned in self._directory.glob(".checkpoint-*.tmp"):
            abandoned.unlink(missing_ok=True)  # of a process that was killed while it wrote
        found = self._found()
        for number, path in found:
            try:
                data = path.read_bytes()
                expected = path.stem.rsplit("-", 1)[1]
                digest = hashlib.sha256(data).hexdigest()[:16]
                if digest != expected:
                    raise ValueError(f"sha256 starts with {digest}; its name says {expected}")
                tensors, state = unpack(data)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                logger.error("checkpoint is damaged, trying the one before", extra={"path": path, "error": error})
                continue
            return Checkpoint(number, tensors, state)
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in {self._directory} can be read; restore one from a backup, "
                "or move the directory away to learn again from the beginning of the topic"
            )
        return None

    def _found(self) -> list[tuple[int, Path]]:
        """Return the checkpoints, newest first."""
        if not self._directory.is_dir():
            return []
        matches = ((_NAME.fullmatch(path.name), path) for path in self._directory.iterdir())
        return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
