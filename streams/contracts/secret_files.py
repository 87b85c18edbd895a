"""Secrets that stand in files, read again when somebody puts new ones there."""

from __future__ import annotations

from pathlib import Path


class SecretFile:
    """A file with one secret.

    Args:
        path: May be a link, as those of orchestrators are, which put a new one in its place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = self._stamp()

    def read(self) -> str:
        """Return the secret as it is now, without the white space around it.

        Raises:
            OSError: If the file cannot be read; the message names it.
        """
        self._seen = self._stamp()
        try:
            return self.path.read_text("utf-8").strip()
        except UnicodeDecodeError:
            raise OSError(f"{self.path} is not text") from None

    def has_changed(self) -> bool:
        """Return whether there is another file than when it was last read; a missing one has not changed (yet)."""
        now = self._stamp()
        return now is not None and now != self._seen

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
