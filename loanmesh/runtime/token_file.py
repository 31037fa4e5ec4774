"""A token in a file, which whoever issues it replaces now and then."""

from __future__ import annotations

from pathlib import Path


class TokenFile:
    """Reads it again when it changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._read = ""

    def token(self) -> str:
        """What it held when it last was sound: while it is replaced it may be gone. Raises OSError, or ValueError for
        what is not one word of ASCII, where it never was."""
        try:
            found = self._path.stat()
            stamp = (found.st_mtime_ns, found.st_ino)
            if stamp != self._stamp:
                self._read, self._stamp = self._one_word(), stamp
        except (OSError, ValueError):
            if self._stamp is None:
                raise
        return self._read

    def _one_word(self) -> str:
        words = self._path.read_text(encoding="ascii").split()
        if len(words) != 1:  # More of them could smuggle a header.
            raise ValueError(f"{self._path}: must hold one token and nothing else")
        return words[0]
