"""Secrets in files are read again when other files stand there."""

from __future__ import annotations

from pathlib import Path

import pytest

from streams.contracts.secret_files import SecretFile
from streams.contracts.settings import RedisSettings, load


def test_new_file_is_noticed_until_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(" old\n")
    file = SecretFile(path)
    assert (file.read(), file.has_changed()) == ("old", False)
    path.write_text("newer")
    assert file.has_changed()
    assert (file.read(), file.has_changed()) == ("newer", False)
    path.unlink()
    assert not file.has_changed(), "between two files there is none"
    with pytest.raises(OSError, match="secret"):
        file.read()


def test_link_that_points_elsewhere_is_another_file(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name).write_text(name)
    link = tmp_path / "link"
    link.symlink_to("1")
    file = SecretFile(link)
    (tmp_path / "next").symlink_to("2")
    (tmp_path / "next").rename(link)
    assert file.has_changed()
    assert file.read() == "2"


def test_settings_give_a_secret_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "url"
    path.write_text("redis://server:old@127.0.0.1:1")
    monkeypatch.setenv("GENCO_REDIS_URL_FILE", str(path))
    settings = load(RedisSettings)
    path.write_text("redis://server:new@127.0.0.1:1")
    assert settings.secret("redis_url") == "redis://server:new@127.0.0.1:1"
    assert "old" in settings.redis_url.get_secret_value()
    assert "new" not in repr(settings)
    monkeypatch.delenv("GENCO_REDIS_URL_FILE")
    fixed = load(RedisSettings, redis_url="redis://server:fixed@127.0.0.1:1")
    assert fixed.file_of("redis_url") is None
    assert fixed.secret("redis_url") == "redis://server:fixed@127.0.0.1:1"
