"""The few things the archive does with a file system, local or any that fsspec knows.

A file that `write` or `move` leaves is whole and, on a local disk, survives a power failure: files and the folders they
stand in are synced. Local moves are atomic. On an object store a move is a copy and a removal: readers see the new
object only when it is complete, and a move that was cut short can be repeated.

It knows nothing of examples.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from streams.contracts.settings import ConfigurationError


class Store:
    """A folder, and files by their names below it."""

    def __init__(self, url: str) -> None:
        """Open the folder; it is created with the first file.

        Args:
            url: A path, or what fsspec takes.

        Raises:
            ConfigurationError: If there is no file system for it.
        """
        protocol = url.partition("://")[0] if "://" in url else "file"  # the rest may hold a password
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigurationError(
                f"GENCO_ARCHIVE_URL has the protocol {protocol}, which cannot be used here ({error}); "
                "install the package it needs, or use a path"
            ) from None
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)

    def write(self, name: str, content: Callable[[IO[bytes]], Any]) -> None:
        """Write a file; `content` is called with it, open."""
        path = self._path(name)
        self._make_folder(path)
        with self._fs.open(path, "wb") as file:
            content(file)
            if self._is_local:
                file.flush()
                os.fsync(file.fileno())
        self._sync_folders(path)

    def read(self, name: str) -> bytes:
        """Return what is in a file.

        Raises:
            FileNotFoundError: If there is none.
        """
        content: bytes = self._fs.cat_file(self._path(name))
        return content

    def exists(self, name: str) -> bool:
        """Say whether there is such a file."""
        self._fs.invalidate_cache()
        return bool(self._fs.isfile(self._path(name)))

    def move(self, source: str, target: str) -> None:
        """Give a file another name, over a file that has it.

        Raises:
            FileNotFoundError: If there is no such file (any more).
        """
        old, new = self._path(source), self._path(target)
        self._make_folder(new)
        if self._is_local:
            os.replace(old, new)
            self._sync_folders(new)
            self._sync_folders(old)
        else:
            self._fs.cp_file(old, new)
            self._fs.rm_file(old)

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        try:
            self._fs.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def names(self, folder: str) -> list[str]:
        """Return the names of all files below a folder ("" for all), in order."""
        self._fs.invalidate_cache()
        start = len(self._root) + 1
        try:
            return sorted(path[start:] for path in self._fs.find(self._path(folder)))
        except FileNotFoundError:
            return []

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _make_folder(self, path: str) -> None:
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _sync_folders(self, path: str) -> None:
        """Make the file's name durable, and the names of the folders above it, which may be new."""
        if not self._is_local:
            return
        folder = path.rpartition("/")[0]
        while len(folder) >= len(self._root):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            folder = folder.rpartition("/")[0]
