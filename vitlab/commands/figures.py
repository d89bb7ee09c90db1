"""Files that a command is asked to write beside what it shows."""

from __future__ import annotations

from pathlib import Path


def writable(file: Path, flag: str = "--json") -> None:
    """Before the work, not after it."""
    from vitlab.config import UserError

    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"{flag}: {file}: a file in a folder that exists is needed")
