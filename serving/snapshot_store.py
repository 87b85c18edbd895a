"""Where snapshots come from: the registry in Redis, and the last good one on disk.

The pointer in Redis counts only when its `revision` is larger than the one that serves: a flushed, restored or older
Redis never moves a server back. What either place gives is verified (length, sha256, HMAC) before anybody uses it.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import redis
from pydantic import ValidationError

from streams.contracts.registry import blob_key, current_key, manifest_key, switches_key
from streams.contracts.snapshot import MAX_BLOB_BYTES, SnapshotError, SnapshotManifest, verify

MAX_MANIFEST_BYTES: Final = 1024 * 1024
_MAGIC: Final = b"genco last good 1\n"


@dataclass(frozen=True, slots=True)
class Pointer:
    """What Redis says is current."""

    epoch: int
    version: int
    revision: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """A verified snapshot and the revision of the pointer that named it."""

    revision: int
    manifest: SnapshotManifest
    blob: bytes


class SnapshotStore:
    """Reads the registry of one model.

    Args:
        client: With short timeouts and no retries; this is called again soon.
        model_id: Whose snapshots.
        key: Verifies manifests.
    """

    def __init__(self, client: redis.Redis, model_id: str, key: bytes) -> None:
        self._client = client
        self._model_id = model_id
        self._key = key

    def pointer(self) -> Pointer | None:
        """Return the pointer, or None if nothing was published.

        Raises:
            SnapshotError: If it is malformed.
            redis.RedisError: If Redis does not answer.
        """
        raw = cast("dict[bytes, bytes]", self._client.hgetall(current_key(self._model_id)))
        if not raw:
            return None
        try:
            pointer = Pointer(
                int(raw[b"epoch"]), int(raw[b"version"]), int(raw[b"revision"]), raw[b"sha256"].decode("ascii")
            )
        except (KeyError, ValueError) as error:
            raise SnapshotError("pointer", f"hash {current_key(self._model_id)} is malformed: {error!r}") from None
        return pointer

    def exploration(self) -> float:
        """Return the share of the traffic beside the uniform one that is to explore; 1 unless an operator said so.

        Raises:
            SnapshotError: If it is malformed.
            redis.RedisError: If Redis does not answer.
        """
        raw = cast("dict[bytes, bytes]", self._client.hgetall(switches_key(self._model_id)))
        text = raw.get(b"exploration") or b"1"
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not 0.0 <= share <= 1.0:
            raise SnapshotError("exploration", f"{switches_key(self._model_id)} says {text[:32]!r}; must be in [0, 1]")
        return share

    def fetch_current(self, after: int | None) -> Fetched | None:
        """Return the current snapshot if its revision is larger than `after`.

        Raises:
            SnapshotError: If it is missing, malformed, not of this model, or fails verification.
            redis.RedisError: If Redis does not answer.
        """
        pointer = self.pointer()
        if pointer is None or (after is not None and pointer.revision <= after):
            return None
        return self.fetch(pointer)

    def fetch(self, pointer: Pointer) -> Fetched:
        """Return the snapshot that a pointer names.

        Raises:
            SnapshotError: If it is missing, malformed, not of this model, or fails verification.
            redis.RedisError: If Redis does not answer.
        """
        where = self._model_id, pointer.epoch, pointer.version
        manifest = _parse_manifest(self._get(manifest_key(*where), MAX_MANIFEST_BYTES))
        if manifest.num_bytes > MAX_BLOB_BYTES:
            raise SnapshotError("size", f"manifest speaks of {manifest.num_bytes} bytes; at most {MAX_BLOB_BYTES}")
        blob = self._get(blob_key(*where), manifest.num_bytes)
        _check(manifest, blob, self._key, self._model_id)
        named = manifest.epoch, manifest.version, manifest.sha256
        if named != (pointer.epoch, pointer.version, pointer.sha256):
            raise SnapshotError("pointer", f"pointer names {pointer}; the manifest there is {named}")
        return Fetched(pointer.revision, manifest, blob)

    def _get(self, key: str, most: int) -> bytes:
        # The length first: a wrong value there must not fill our memory.
        length = self._client.strlen(key)
        if length > most:
            raise SnapshotError("size", f"{key} has {length} bytes; expected at most {most}")
        value = cast("bytes | None", self._client.get(key))
        if value is None:
            raise SnapshotError("missing", f"{key} is not in Redis, though the pointer names it; publish it again")
        return value


class LastGood:
    """The last verified snapshot, in one file, so that manifest and blob cannot part.

    Args:
        directory: Made when needed.
        model_id: Whose snapshot; several models can share a directory.
        key: Verifies what is read: the disk is not trusted either.
    """

    def __init__(self, directory: Path, model_id: str, key: bytes) -> None:
        self.path: Final = directory / f"{model_id}.snapshot"
        self._model_id = model_id
        self._key = key

    def save(self, fetched: Fetched) -> None:
        """Replace the file atomically: after a crash it is the old one or the new one.

        Raises:
            OSError: If the disk does not take it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header: dict[str, Any] = {"revision": fetched.revision, "manifest": fetched.manifest.model_dump(mode="json")}
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self._model_id}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + msgspec.json.encode(header) + b"\n")
                file.write(fetched.blob)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def load(self) -> Fetched | None:
        """Return the snapshot, or None if none was ever saved.

        Raises:
            SnapshotError: If the file is not what was saved.
            OSError: If it cannot be read.
        """
        try:
            return read_last_good(self.path, self._model_id, self._key)
        except FileNotFoundError:
            return None


def read_last_good(path: Path, model_id: str | None, key: bytes) -> Fetched:
    """Return the snapshot in a file that a server has kept; model None: whichever it is of.

    Raises:
        SnapshotError: If the file is not what was saved, or of another model.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_BLOB_BYTES + MAX_MANIFEST_BYTES)
    header, newline, blob = raw.removeprefix(_MAGIC).partition(b"\n")
    if not raw.startswith(_MAGIC) or not newline:
        raise SnapshotError("format", f"{path} is no last good snapshot; delete it")
    try:
        parsed = msgspec.json.decode(header, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SnapshotError("format", f"{path} has a bad header ({error}); delete it") from None
    manifest = _parse_manifest(bytes(parsed.manifest))
    _check(manifest, blob, key, manifest.model_id if model_id is None else model_id)
    return Fetched(parsed.revision, manifest, blob)


class _Header(msgspec.Struct):
    revision: int
    manifest: msgspec.Raw


def _parse_manifest(raw: bytes) -> SnapshotManifest:
    try:
        return SnapshotManifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise SnapshotError("manifest", f"manifest: {field}: {first['msg']}") from None


def _check(manifest: SnapshotManifest, blob: bytes, key: bytes, model_id: str) -> None:
    verify(manifest, blob, key)
    if manifest.model_id != model_id:
        raise SnapshotError("model", f"snapshot is of model {manifest.model_id[:64]!r}; expected {model_id!r}")
    if not manifest.gate.accepted:
        raise SnapshotError("gate", f"the gate refused version {manifest.version}: {'; '.join(manifest.gate.reasons)}")
