"""Output paths are checked before the work, not after it."""

from pathlib import Path


def require_folder(path: Path | None) -> None:
    """Check that a file can be written at this path; None: nothing is to be written.

    Raises:
        ValueError: If its folder does not exist, or it is a folder itself.
    """
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"cannot write {path}: {path.absolute().parent} must be an existing folder, and {path} a file")
