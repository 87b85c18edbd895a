"""A pickle that would write a file is refused wherever bytes come in, and the file is not written."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.messages import InvalidBodyError, read_clicks, read_decide, read_tokens
from serving.snapshot_store import read_last_good
from streams.contracts.codec import EventDecoder
from streams.contracts.control import ControlRecord
from streams.contracts.events import Click, Impression
from streams.contracts.examples import decode_examples
from streams.contracts.snapshot import SnapshotError, SnapshotManifest, unpack_tensors

KEY = b"k" * 32


class Exploit:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(params=(0, pickle.HIGHEST_PROTOCOL), ids=lambda number: f"protocol-{number}")
def exploit(request: pytest.FixtureRequest, canary: Path) -> bytes:
    raw = pickle.dumps(Exploit(canary), request.param)
    pickle.loads(raw)  # noqa: S301
    assert canary.exists(), "it would work"
    canary.unlink()
    return raw


READERS: dict[str, tuple[Callable[[bytes], object], type[Exception]]] = {
    "decide": (read_decide, InvalidBodyError),
    "clicks": (read_clicks, InvalidBodyError),
    "impressions": (read_tokens, InvalidBodyError),
    "topic examples": (decode_examples, ValueError),
    "topic control": (ControlRecord.from_bytes, ValueError),
    "blob in Redis": (unpack_tensors, SnapshotError),
    "manifest in Redis": (SnapshotManifest.model_validate_json, ValueError),
}


@pytest.mark.parametrize("reader", READERS)
def test_pickle_is_refused(exploit: bytes, canary: Path, reader: str) -> None:
    read, error = READERS[reader]
    with pytest.raises(error):
        read(exploit)
    assert not canary.exists()


@pytest.mark.parametrize("kind", [Impression, Click])
def test_pickle_in_a_topic_of_events_is_a_bad_event(
    exploit: bytes, canary: Path, kind: type[Impression | Click]
) -> None:
    decoded = EventDecoder(kind).decode_batch(exploit)
    assert not decoded.events
    assert decoded.bad
    assert not canary.exists()


def test_pickle_on_disk_is_no_last_good_snapshot(exploit: bytes, canary: Path, tmp_path: Path) -> None:
    path = tmp_path / "default.snapshot"
    path.write_bytes(exploit)
    with pytest.raises(SnapshotError):
        read_last_good(path, "default", KEY)
    assert not canary.exists()


def test_pickle_on_disk_is_no_checkpoint(exploit: bytes, canary: Path) -> None:
    pytest.importorskip("torch")
    from safetensors import SafetensorError

    from learner.checkpoint import unpack

    with pytest.raises(SafetensorError):
        unpack(exploit)
    assert not canary.exists()
