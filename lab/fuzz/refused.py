"""How a reader of odd files says that it did its duty."""

from __future__ import annotations


class Refused(Exception):
    """A clear error: what its author is told."""
