"""How a command ends. The same words for all, also in README.md."""

FAILED = 1
"""It was tried, and did not come out as asked."""
USAGE = 2
"""A word, file or setting is wrong; nothing was tried."""
UNREACHABLE = 3
"""Nobody answers, or nobody has room now: the same again later may do."""
REFUSED = 4
"""The mesh says no: the same again will not do."""
INTERRUPTED = 130
"""Ctrl-C, as shells count it."""
