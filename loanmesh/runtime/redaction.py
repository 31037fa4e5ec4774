"""The last line of defence: personal data and secrets masked in what leaves as a log, by key and by pattern.

The first line is not to log them at all. This one is for the text of somebody else's error, and for mistakes of ours.
Patterns are checked by their check digits where they have some, so that ids and times of ours stay readable.
"""

from __future__ import annotations

import logging
import re
import resource
import sys
import threading
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import structlog

from loanmesh.runtime.identity import valid_credit_code, valid_resident_id

MASK = "[masked]"
KEYS = frozenset(
    {
        "identity", "identity_number", "legal_name", "number", "numbers", "subject", "phone", "mobile", "card",
        "payload", "profile", "declaration", "parties", "password", "secret", "token", "authorization", "database_url",
        "url", "dsn",
    }
)  # fmt: skip
"""Words that name what is never shown, wherever they stand as a key."""
OURS = frozenset({"trace_id", "span_id", "timestamp", "level", "service"})
"""Keys whose values we make ourselves."""
DEPTH_MAX = 4
"""Lists and maps within each other; what lies deeper is masked whole."""
_SUSPECT = re.compile(r"\d{4}|://[^/\s]*@")
"""What none of the patterns does without: most values stop here."""
_PATTERN = re.compile(
    r"(?P<resident>(?<!\d)\d{17}[\dXx](?!\d))"
    r"|(?P<firm>(?<![0-9A-Za-z])[1-9AN][1-9]\d{6}[0-9A-HJ-NP-RTUWXY]{10}(?![0-9A-Za-z]))"
    r"|(?P<card>(?<![0-9A-Za-z])(?:62|4|5[1-5])\d{13,17}(?![0-9A-Za-z]))"
    r"|(?P<mobile>(?<![0-9A-Za-z])(?:\+?86[- ]?)?1[3-9]\d(?:[- ]?\d{4}){2}(?![0-9A-Za-z]))"
    r"|(?P<password>(?<=://)[^/\s:@]*:[^/\s@]*(?=@))"
)


def mask(text: str) -> str:
    """The text without identity numbers, social credit codes, bank cards, mobile numbers and passwords in addresses."""
    return _PATTERN.sub(_masked, text) if _SUSPECT.search(text) else text


def _masked(found: re.Match[str]) -> str:
    said = found.group()
    match found.lastgroup:
        case "resident":
            sure = valid_resident_id(said.upper()) or _luhn(said)
        case "firm":
            sure = valid_credit_code(said)
        case "card":
            sure = _luhn(said)
        case _:
            sure = True
    return MASK if sure else said


def _luhn(number: str) -> bool:
    """Whether the check digit of a bank card fits (ISO/IEC 7812)."""
    if not number.isdecimal():
        return False
    digits = [int(digit) for digit in reversed(number)]
    return (sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0


def redact(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """A structlog processor: every value of an event as it may be shown. Stands right before the renderer."""
    for key, value in event.items():
        if key not in OURS:
            event[key] = _shown(key, value, DEPTH_MAX)
    return event


def _shown(key: object, value: Any, depth: int) -> Any:
    if key in KEYS and value not in (None, "", (), []):
        return MASK
    match value:
        case str():
            return mask(value)
        case None | bool() | float():
            return value
        case int():
            return value if abs(value) < 10**10 or (said := str(value)) == mask(said) else MASK
        case Mapping() if depth:
            return {mask(str(name)): _shown(name, inner, depth - 1) for name, inner in value.items()}
        case list() | tuple() | set() | frozenset() if depth:
            return [_shown("", inner, depth - 1) for inner in value]
        case Mapping() | list() | tuple() | set() | frozenset():
            return MASK
        case _:
            return mask(repr(value))


class _Library(logging.Handler):
    """What libraries log, as lines of ours. Theirs would go to stderr as they are, with whatever stands in them."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(
            record.levelno, "library_says", logger=record.name, text=record.getMessage(), exc_info=record.exc_info
        )


def guard_outputs() -> None:
    """Send what libraries log through our processors, mask what a process says when it falls over, and leave no core.

    A core dump is the whole memory, with what is sealed everywhere else in the open, keys included.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    logging.basicConfig(handlers=[_Library(logging.WARNING)], force=True)
    logging.captureWarnings(capture=True)
    sys.excepthook = _fell
    threading.excepthook = _thread_fell
    sys.unraisablehook = _nobody_caught


def _fell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(mask("".join(traceback.format_exception(kind, error, trace))))


def _thread_fell(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit:  # The one way of ending that is no fault, as Python's own hook has it.
        return
    name = args.thread.name if args.thread else "unknown"
    sys.stderr.write(mask(f"Exception in thread {name}:\n{_told(args)}"))


def _nobody_caught(args: sys.UnraisableHookArgs) -> None:
    """What is raised where nobody can catch it, in a finaliser say."""
    where = getattr(args.object, "__qualname__", type(args.object).__qualname__)  # Its repr may show what it holds.
    sys.stderr.write(mask(f"{args.err_msg or 'Exception ignored in'}: {where}\n{_told(args)}"))


def _told(args: threading.ExceptHookArgs | sys.UnraisableHookArgs) -> str:
    return "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
