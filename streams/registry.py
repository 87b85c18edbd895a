"""Reads the registry of a model in Redis, for operators: what is stored, what is current, who changed it."""

from __future__ import annotations

import logging
from typing import Any

import redis
from pydantic import ValidationError

from streams.contracts.control import AuditRecord, RegistryState
from streams.contracts.registry import (
    SWITCHES,
    Version,
    audit_key,
    candidate_key,
    current_key,
    epoch_key,
    freeze_key,
    history_key,
    manifest_key,
    pin_key,
    revision_key,
    sequence_key,
    switches_key,
)
from streams.contracts.snapshot import SnapshotError, SnapshotManifest

logger = logging.getLogger(__name__)

POINTER_FIELDS = ("epoch", "version", "revision", "sha256")


class Registry:
    """What Redis holds of one model. Every method may raise `redis.RedisError`."""

    def __init__(self, client: redis.Redis, model_id: str) -> None:
        self._client = client
        self.model_id = model_id

    def state(self) -> RegistryState:
        """Return everything but the snapshots, as of one moment.

        Raises:
            ValueError: If somebody else wrote there.
        """
        model = self.model_id
        with self._client.pipeline(transaction=True) as pipeline:
            pipeline.hmget(current_key(model), POINTER_FIELDS)
            for key in (pin_key(model), freeze_key(model), epoch_key(model), revision_key(model), sequence_key(model)):
                pipeline.get(key)
            pipeline.hmget(switches_key(model), SWITCHES)
            found: list[Any] = pipeline.execute()
        pointer, pin, freeze, epoch, revision, sequence, switches = found
        learning_frozen, exploration, clicks_accepted_ms = switches
        has_pointer = any(value is not None for value in pointer)
        fields: dict[str, Any] = {
            "pointer": dict(zip(POINTER_FIELDS, pointer, strict=True)) if has_pointer else None,
            "pin": pin,
            "frozen": freeze is not None,
            "learning_frozen": learning_frozen == b"1",
            "exploration": exploration or None,
            "clicks_accepted_ms": clicks_accepted_ms or 0,
            "epoch": epoch or 0,
            "revision": max(int(revision or 0), int(pointer[2] or 0)),
            "sequence": sequence or 0,
        }
        try:
            return RegistryState.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"the registry of model {model!r} is damaged: {field}: {first['msg']}") from None

    def is_empty(self) -> bool:
        """Whether no learner has held the lease since Redis was empty: nothing else there counts then."""
        return not self._client.exists(epoch_key(self.model_id))

    def history(self) -> list[Version]:
        """Return the versions that are stored, newest first."""
        names: Any = self._client.lrange(history_key(self.model_id), 0, -1)
        return [Version.parse(name.decode()) for name in names]

    def manifest(self, version: Version) -> SnapshotManifest:
        """Return the manifest of a stored version; its signature is not verified.

        Raises:
            SnapshotError: If it is missing or malformed.
        """
        (found,) = self.manifests([version]).values()
        if found is None:
            raise SnapshotError(
                "missing",
                f"version {version} of model {self.model_id!r} has no readable manifest in Redis; "
                "genco policy list shows what is stored",
            )
        return found

    def manifests(self, versions: list[Version]) -> dict[Version, SnapshotManifest | None]:
        """Return the manifests of many versions, None for those that are missing or malformed."""
        if not versions:
            return {}
        raw: Any = self._client.mget([manifest_key(self.model_id, *version) for version in versions])
        return {version: _parsed(value) for version, value in zip(versions, raw, strict=True)}

    def candidate(self) -> SnapshotManifest | None:
        """Return the manifest of the newest snapshot made, stored or refused by the gate."""
        raw: Any = self._client.get(candidate_key(self.model_id))
        return _parsed(raw)

    def audit(self, most: int) -> list[AuditRecord]:
        """Return the newest operator actions, newest first; what is no record is logged and left out."""
        raw: Any = self._client.lrange(audit_key(self.model_id), 0, most - 1)
        records = []
        for value in raw:
            try:
                records.append(AuditRecord.model_validate_json(value))
            except ValidationError as error:
                logger.warning("audit record left out", extra={"error": str(error)[:200]})
        return records


def _parsed(raw: bytes | None) -> SnapshotManifest | None:
    try:
        return None if raw is None else SnapshotManifest.model_validate_json(raw)
    except ValidationError:
        return None
