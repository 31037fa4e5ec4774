"""What is masked in logs, what stays readable, and that nothing gets past by another way."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis.strategies import dates, integers, sampled_from

from lab.identity import credit_code, resident_id
from loanmesh.runtime.clock import FakeClock, new_owner, new_uuid7
from loanmesh.runtime.redaction import MASK, mask, redact

PERSON = resident_id(7, dt.date(1990, 1, 2))
FIRM = credit_code(7)
CARD = "6222020000000000000"
MOBILE = "13900001234"


@pytest.mark.parametrize("said", [PERSON, FIRM, MOBILE, f"+86 {MOBILE}", "139-0000-1234", CARD])
@pytest.mark.parametrize("around", ["{}", "{} 不符", "张三{}", "bad value: '{}'", '{{"x": "{}"}}', "a,{};b"])
def test_a_number_is_masked_wherever_it_stands(said: str, around: str) -> None:
    assert said not in mask(around.format(said))
    assert MASK in mask(around.format(said))


@given(index=integers(0, 9_999_999), born=dates(dt.date(1920, 1, 1), dt.date(2008, 1, 1)), glue=sampled_from("x_ -'/"))
def test_every_resident_number_is_masked(index: int, born: dt.date, glue: str) -> None:
    assert resident_id(index, born) not in mask(f"a{glue}{resident_id(index, born)}{glue}z")


@pytest.mark.parametrize(
    "said",
    [
        "0192f0c1-2b3c-7d4e-8f90-123456789012", pytest.param(new_uuid7(FakeClock()), id="an id"),
        pytest.param(new_owner("intake"), id="an owner"), "2026-11-25T01:02:03.123456Z",
        "1764032523", "1764032523123", "4bf92f3577b34da6a3ce929d0e0e4736", "amount_fen=300000000", "127.0.0.1:7401",
        "123456789012345678", "cn-demo-2026-11", "http://127.0.0.1:4317",
    ],
)  # fmt: skip
def test_what_is_ours_stays_readable(said: str) -> None:
    assert mask(said) == said


def test_a_password_in_an_address_is_masked() -> None:
    assert mask("cannot reach postgresql://loan:s3cret@db/x") == f"cannot reach postgresql://{MASK}@db/x"


def test_keys_that_name_personal_data_are_masked_whatever_they_hold() -> None:
    event = {"event": "e", "legal_name": "张三", "deep": {"parties": [{"x": "李四"}], "ok": [PERSON]}, "number": 7}
    shown = redact(None, "", event)
    assert shown == {"event": "e", "legal_name": MASK, "deep": {"parties": MASK, "ok": [MASK]}, "number": MASK}


def test_what_lies_too_deep_is_masked_whole() -> None:
    deep: object = "张三"
    for _ in range(10):
        deep = [deep]
    assert "张三" not in str(redact(None, "", {"deep": deep}))


def test_numbers_and_objects_are_looked_at_too() -> None:
    shown = redact(None, "", {"a": int(PERSON[:17] + "0") if PERSON[17] == "X" else int(PERSON), "b": ValueError(FIRM)})
    assert FIRM not in str(shown)
    assert MOBILE not in str(redact(None, "", {"a": int(MOBILE), "n": 12, "t": True}))


CRASH = f"""
import logging, threading, warnings, sys
from loanmesh.runtime.redaction import guard_outputs
from loanmesh.runtime.telemetry import start_telemetry
from loanmesh.runtime.settings import TelemetrySettings
import structlog
start_telemetry("test", "test-1", TelemetrySettings())
guard_outputs()
structlog.get_logger().error("call_failed", exc_info=ValueError("{PERSON} is wrong"))
logging.getLogger("asyncio").error("task failed: %s", "{FIRM}")
warnings.warn("careless {MOBILE}")
def fail():
    raise LookupError("in a thread, of {PERSON}")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
class Held:
    def __del__(self):
        raise ArithmeticError("in a finaliser, of {PERSON}")
Held()
raise RuntimeError("of {CARD}")
"""


def test_a_process_that_falls_over_shows_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    for said in (PERSON, FIRM, MOBILE, CARD):
        assert said not in done.stderr + done.stdout
    assert "RuntimeError: of [masked]" in done.stderr
    assert "LookupError: in a thread, of [masked]" in done.stderr
    assert "ArithmeticError: in a finaliser, of [masked]" in done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert {"call_failed", "library_says"} == {line["event"] for line in lines}
