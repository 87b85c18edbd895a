"""A checkpoint is whole or not there, and a damaged one gives way to the one before it."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from learner.checkpoint import KEEP, CheckpointError, CheckpointStore  # noqa: E402

STATE: dict[str, Any] = {
    "offsets": {"0": 12, "1": 0},
    "text": "é\n",
    "none": None,
    "list": [1, 2.5, True],
    "big": 2**60,
}


def tensors(value: float = 1.0) -> dict[str, Any]:
    return {
        "weights": torch.full((3, 4), value),
        "double": torch.arange(5, dtype=torch.float64) / 3,
        "ids": torch.tensor([2**62, -1]),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty((0, 7)),
    }


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "made" / "here")


def files(store: CheckpointStore) -> list[Path]:
    return sorted(store._directory.iterdir())


def test_there_is_nothing_before_the_first(store: CheckpointStore) -> None:
    assert store.load_newest() is None
    store._directory.mkdir(parents=True)
    assert store.load_newest() is None


def test_tensors_and_state_survive_bit_for_bit(store: CheckpointStore) -> None:
    path = store.save(7, tensors(), STATE)
    assert path.is_file()
    loaded = CheckpointStore(store._directory).load_newest()
    assert loaded is not None
    assert (loaded.number, loaded.state) == (7, STATE)
    assert loaded.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert loaded.tensors[name].shape == tensor.shape
        assert torch.equal(loaded.tensors[name], tensor)


def test_views_and_gradients_are_saved_by_value(store: CheckpointStore) -> None:
    weights = torch.arange(12.0).reshape(3, 4).requires_grad_()
    store.save(1, {"transposed": weights.t(), "slice": weights[1:, ::2]}, {})
    loaded = store.load_newest()
    assert loaded is not None
    assert torch.equal(loaded.tensors["transposed"], weights.detach().t())
    assert torch.equal(loaded.tensors["slice"], weights.detach()[1:, ::2])
    assert loaded.state == {}


def test_newest_by_number_is_loaded(store: CheckpointStore) -> None:
    for number in (9, 10, 11):
        store.save(number, tensors(number), {"n": number})
    loaded = store.load_newest()
    assert loaded is not None
    assert (loaded.number, loaded.state["n"], loaded.tensors["weights"][0, 0].item()) == (11, 11, 11.0)


def test_newest_few_are_kept(store: CheckpointStore) -> None:
    assert KEEP == 3
    paths = [store.save(number, tensors(number), {}) for number in range(1, 8)]
    assert files(store) == paths[-KEEP:]


def test_torn_file_gives_way_to_the_one_before(store: CheckpointStore) -> None:
    store.save(1, tensors(1), {"n": 1})
    data = (newest := store.save(2, tensors(2), {"n": 2})).read_bytes()
    for length in (0, 1, 8, len(data) // 2, len(data) - 1):
        newest.write_bytes(data[:length])
        loaded = store.load_newest()
        assert loaded is not None
        assert (loaded.number, loaded.state) == (1, {"n": 1}), f"cut to {length} bytes"
    newest.write_bytes(data + b"\0")
    assert store.load_newest().number == 1  # type: ignore[union-attr]
    newest.write_bytes(data)
    assert store.load_newest().number == 2  # type: ignore[union-attr]


def test_flipped_byte_anywhere_gives_way_to_the_one_before(store: CheckpointStore) -> None:
    store.save(1, tensors(1), {"n": 1})
    newest = store.save(2, tensors(2), {"n": 2})
    data = newest.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 50)):
        newest.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        loaded = store.load_newest()
        assert loaded is not None
        assert loaded.number == 1, f"byte {place}"


def test_two_damaged_files_give_way_to_the_third(store: CheckpointStore) -> None:
    paths = [store.save(number, tensors(number), {"n": number}) for number in (1, 2, 3)]
    for path in paths[1:]:
        path.write_bytes(b"x")
    assert store.load_newest().number == 1  # type: ignore[union-attr]


def test_unreadable_file_gives_way_to_the_one_before(store: CheckpointStore) -> None:
    store.save(1, tensors(), {})
    newest = store.save(2, tensors(), {})
    newest.unlink()
    newest.mkdir()
    assert store.load_newest().number == 1  # type: ignore[union-attr]


def test_when_all_are_damaged_nothing_starts_from_nothing(store: CheckpointStore) -> None:
    for number in (1, 2):
        store.save(number, tensors(), {}).write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* can be read"):
        store.load_newest()


def test_learning_goes_on_after_a_fallback(store: CheckpointStore) -> None:
    store.save(1, tensors(1), {"n": 1})
    store.save(2, tensors(2), {"n": 2}).write_bytes(b"garbage")
    # The learner is at 1 again and comes to 2 a second time, with other contents.
    for number in (2, 3, 4):
        store.save(number, tensors(number), {"again": number})
        loaded = store.load_newest()
        assert loaded is not None
        assert (loaded.number, loaded.state) == (number, {"again": number})


def test_temporary_and_foreign_files_are_no_checkpoints(store: CheckpointStore) -> None:
    path = store.save(1, tensors(), {"n": 1})
    for name in (
        f".{path.name.replace('01-', '09-')}.123.tmp",
        f"{path.name}.tmp",
        "checkpoint-000000000009.safetensors",
        "checkpoint-9-0123456789abcdef.safetensors",
        "notes.txt",
    ):
        (store._directory / name).write_bytes(b"garbage")
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.number == 1
    for number in (2, 3, 4, 5):
        store.save(number, tensors(), {})
    assert (store._directory / "notes.txt").exists()


@pytest.mark.parametrize("broken", ["fsync", "rename"])
def test_disk_error_leaves_the_old_ones_and_no_rest(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    for number in (1, 2, 3):
        store.save(number, tensors(number), {"n": number})
    before = files(store)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if broken == "fsync":
            patch.setattr(os, "fsync", refuse)
        else:
            patch.setattr(Path, "rename", refuse)
            patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="No space left"):
            store.save(4, tensors(4), {"n": 4})
    assert files(store) == before
    assert store.load_newest().number == 3  # type: ignore[union-attr]
    store.save(4, tensors(4), {"n": 4})
    assert store.load_newest().number == 4  # type: ignore[union-attr]


def test_file_is_on_the_disk_before_it_has_its_name(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_fsync, real_rename, real_unlink = os.fsync, Path.rename, Path.unlink

    def fsync(descriptor: int) -> None:
        calls.append("fsync " + ("directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"))
        real_fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        calls.append("rename")
        return real_rename(self, target)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if not self.name.endswith(".tmp"):
            calls.append("remove")
        real_unlink(self, missing_ok=missing_ok)

    for number in (1, 2, 3):
        store.save(number, tensors(number), {})
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "unlink", unlink)
    store.save(4, tensors(), {})
    assert calls == ["fsync file", "rename", "fsync directory", "remove"]


@pytest.mark.parametrize("state", [{"x": float("nan")}, {"x": object()}])
def test_state_that_json_cannot_hold_is_refused_before_anything_is_written(
    store: CheckpointStore, state: dict[str, Any]
) -> None:
    store.save(1, tensors(), {})
    before = files(store)
    with pytest.raises((ValueError, TypeError)):
        store.save(2, tensors(), state)
    assert files(store) == before


def test_damaged_files_do_not_push_out_good_ones(store: CheckpointStore) -> None:
    for number in (10, 20, 30):
        store.save(number, tensors(number), {"n": number})
    for path in files(store)[1:]:
        path.write_bytes(b"garbage")
    for number in (11, 12, 13):
        store.save(number, tensors(number), {"n": number})
    good = [path for path in files(store) if path.read_bytes() != b"garbage"]
    assert len(good) >= 2
