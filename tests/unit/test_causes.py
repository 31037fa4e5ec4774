"""Root causes read from traces: what came first, not what followed of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loanmesh.runtime import semconv
from loanmesh.seeing.causes import METHODS_OF, cause_in, why_failed
from loanmesh.seeing.spans import Span, Value
from tests.spans import a_span

SUBMIT = "lending.intake.v1.IntakeService/SubmitApplication"


def a_hop(service: str, error: str, cause: str = "", application: str = "a1") -> Span:
    said: dict[str, Value] = {semconv.RPC_METHOD: METHODS_OF[service], semconv.CAUSE: cause}
    return a_span(
        METHODS_OF[service], span_id=f"h{service}", kind="client", error=error, application=application, attributes=said
    )


def a_source(source: str, error: str, cause: str = "", trace: str = "aa", took_s: float = 0.1) -> Span:
    said = {semconv.SOURCE: source, semconv.CAUSE: cause}
    return a_span(
        f"ask {source}", trace=trace, span_id=f"s{source}", service="bureau", kind="client", error=error,
        application=trace, began=1.0, ended=1.0 + took_s, attributes=said,
    )  # fmt: skip


def a_call(error: str, **said: Value) -> Span:
    facts = {f"loanmesh.{name}": value for name, value in said.items()} | {semconv.RPC_STATUS_CODE: error}
    return a_span(SUBMIT, kind="server", error=error, attributes=facts)


def a_callers(error: str, **said: Value) -> Span:
    """A caller's own span of its call."""
    return replace(a_call(error, **said), service="app", kind="client")


def an_attempt(outcome: str, error: str = "", **said: Value) -> Span:
    facts = {semconv.OUTCOME: outcome} | {f"loanmesh.{name}": value for name, value in said.items()}
    return a_span(span_id="p1", error=error, application="a1", kept_for=outcome, attributes=facts)


DISK = "the database cannot be written: database or disk is full"
LOCKED = "the database cannot be written: database is locked"
TLS = "tls_server_untrusted: Tls handshake failed: CERTIFICATE_VERIFY_FAILED"


@pytest.mark.parametrize(
    ("spans", "kind", "hop"),
    [
        ([a_source("court", "unavailable")], "source_down", "bureau -> court"),
        ([a_source("tax", "timeout")], "source_slow", "bureau -> tax"),
        ([a_source("tax", "", took_s=0.8)], "source_slow", "bureau -> tax"),
        ([a_source("tax", "overloaded")], "source_over_quota", "bureau -> tax"),
        ([a_source("tax", "breaker_open", "forced open by li.na")], "breaker_forced", "bureau -> tax"),
        ([a_source("tax", "breaker_open", "9 of 10 calls took 3 s or longer")], "source_slow", "bureau -> tax"),
        ([a_hop("scoring", "UNAVAILABLE", TLS)], "bad_certificate", "intake -> scoring"),
        ([a_hop("scoring", "UNAVAILABLE", "Connection refused")], "service_down", "intake -> scoring"),
        ([a_hop("bureau", "DEADLINE_EXCEEDED")], "service_slow", "intake -> bureau"),
        ([a_call("RESOURCE_EXHAUSTED", reason="OVER_QUOTA")], "budget_full", "caller -> intake"),
        ([a_call("RESOURCE_EXHAUSTED", reason="OVERLOADED")], "overload", "caller -> intake"),
        ([a_callers("RESOURCE_EXHAUSTED", reason="OVER_QUOTA")], "budget_full", "caller -> intake"),
        ([a_callers("RESOURCE_EXHAUSTED", reason="OVERLOADED")], "overload", "caller -> intake"),
        ([a_callers("RESOURCE_EXHAUSTED")], "caller_throttled", "caller"),
        ([a_call("DEADLINE_EXCEEDED", reason="DEADLINE_PASSED")], "deadline_expired", "caller -> intake"),
        ([a_call("UNAVAILABLE", reason="DEPENDENCY_DOWN", cause=DISK)], "disk_full", "intake -> database"),
        ([an_attempt("failed", "DependencyDown", cause=LOCKED)], "database_slow", "intake -> database"),
        ([an_attempt("parked", "score_broke", stage="score")], "poisoned_application", "intake -> score"),
        ([an_attempt("lost", "fence_lost", owner="intake-7-ab")], "replica_paused", "intake (intake-7-ab)"),
    ],
)
def test_each_trouble_has_its_name(spans: list[Span], kind: str, hop: str) -> None:
    cause = cause_in(spans, {})
    assert cause
    assert (cause.kind, cause.hop) == (kind, hop)
    assert cause.then.startswith(("loanmesh ", "df "))


def a_lost_lease() -> Span:
    said: dict[str, Value] = {semconv.OWNER: "intake-7-ab", semconv.LEASE_END: 10.0}
    return a_span("lost attempt", error="lease_ended", application="a1", attributes=said)


def test_who_is_heard_of_after_its_lease_stood_still_and_did_not_die() -> None:
    def kind(seen: dict[str, float], alive: set[str]) -> str:
        cause = cause_in([a_lost_lease()], seen, alive)
        return cause.kind if cause else ""

    assert kind({"intake-7-ab": 9.0}, {"8"}) == "replica_died"
    assert kind({"intake-7-ab": 11.0}, {"8"}) == "replica_paused"
    assert kind({"intake-7-ab": 9.0}, {"7"}) == "replica_paused"  # It runs, and tells nothing.


def test_a_decided_application_that_was_only_sampled_has_no_cause() -> None:
    assert cause_in([an_attempt("APPROVED")], {}) is None


def test_an_open_breaker_is_read_as_what_opened_it() -> None:
    before = [a_source("court", "unavailable", trace=f"b{n}") for n in range(3)]
    after = [a_source("court", "breaker_open", "10 of 10 calls failed", trace=f"c{n}") for n in range(5)]
    (group,) = why_failed([*before, *after], {})
    assert (group.cause.kind, group.count, group.breaker) == ("source_down", 8, "10 of 10 calls failed")


def test_the_most_frequent_cause_comes_first_with_an_example_to_look_at() -> None:
    spans = [a_source("tax", "timeout", trace="1")] + [
        a_source("court", "unavailable", trace=f"2{n}") for n in range(3)
    ]
    first, second = why_failed(spans, {})
    assert (first.cause.kind, first.count) == ("source_down", 3)
    assert (second.cause.kind, second.count, second.example) == ("source_slow", 1, "1")


def test_who_was_turned_away_or_gave_up_behind_a_slow_disk_met_the_disk() -> None:
    said: dict[str, Value] = {semconv.DB_OPERATION: "accept"}
    slow = a_span("accept applications", application="a0", kind="client", ended=2.2, attributes=said)
    shed = replace(a_call("RESOURCE_EXHAUSTED", reason="OVERLOADED"), trace_id="b1", began=3.0, ended=3.0)
    late = replace(a_call("DEADLINE_EXCEEDED"), trace_id="b2", began=1.5, ended=2.0)
    long_after = replace(shed, trace_id="b3", began=9.0, ended=9.0)
    groups = {group.cause.kind: group.count for group in why_failed([slow, shed, late, long_after], {})}
    assert groups == {"database_slow": 3, "overload": 1}


def test_a_caller_that_was_refused_and_then_served_met_no_trouble_and_of_us_only_the_door_speaks() -> None:
    served = replace(a_callers("", reason="OVERLOADED"), error="")
    assert cause_in([served], {}) is None
    inside = replace(a_callers("RESOURCE_EXHAUSTED", reason="OVERLOADED"), service="intake")
    assert cause_in([inside], {}) is None


def test_what_was_slow_long_before_a_patient_caller_gave_up_is_not_its_trouble() -> None:
    said: dict[str, Value] = {semconv.DB_OPERATION: "accept"}
    slow = a_span("accept applications", application="a0", kind="client", began=9.4, ended=10.0, attributes=said)
    patient = replace(a_callers("RESOURCE_EXHAUSTED", reason="OVERLOADED"), trace_id="b1", began=1.0, ended=31.0)
    hasty = replace(patient, trace_id="b2", ended=11.0)
    groups = {group.cause.kind: group.count for group in why_failed([slow, patient, hasty], {})}
    assert groups == {"database_slow": 2, "overload": 1}


def test_who_waited_while_a_service_was_down_waited_for_it() -> None:
    down = a_hop("scoring", "UNAVAILABLE", "Connection refused", application="a0")

    def waited(application: str, trace: str, waited_s: float) -> Span:
        said: dict[str, Value] = {semconv.WAITED_MS: waited_s * 1000}
        return a_span(trace=trace, application=application, kept_for="late", began=5.0, ended=5.1, attributes=said)

    during, after = waited("a1", "b1", 4.0), waited("a2", "b2", 1.0)
    groups = {group.cause.kind: group.count for group in why_failed([down, during, after], {})}
    assert groups == {"service_down": 2, "backlog": 1}


def test_applications_of_one_batch_are_told_apart_and_share_the_call() -> None:
    one = a_hop("scoring", "UNAVAILABLE", application="a1")
    two = a_hop("pricing", "UNAVAILABLE", application="a2")
    groups = why_failed([a_call("OK"), one, two], {})
    assert {group.cause.hop: group.count for group in groups} == {"intake -> scoring": 1, "intake -> pricing": 1}


def test_a_cause_is_over_once_all_that_waited_for_it_are_decided() -> None:
    asked = replace(
        a_source("court", "unavailable"), attributes={semconv.SOURCE: "court", semconv.APPLICATION_ID: "a1"}
    )
    waiting = [asked, an_attempt("deferred", "source_missing:court")]
    (group,) = why_failed(waiting, {})
    assert (group.undecided, group.decided_at, group.over) == (1, None, False)
    went_well = replace(an_attempt("APPROVED"), span_id="p2", began=60.0, ended=61.0)
    (group,) = why_failed([*waiting, went_well], {})
    assert (group.undecided, group.decided_at, group.over) == (0, 61.0, True)
    parked_later = replace(an_attempt("parked"), span_id="p3", began=70.0, ended=71.0)
    assert not any(group.over for group in why_failed([*waiting, went_well, parked_later], {}))


def test_a_call_that_stored_nothing_waits_for_nobody() -> None:
    (group,) = why_failed([a_call("RESOURCE_EXHAUSTED", reason="OVERLOADED")], {})
    assert (group.undecided, group.decided_at, group.over) == (0, None, False)


def test_of_an_open_breaker_alone_it_is_told_why_it_opened() -> None:
    cause = cause_in([a_source("court", "breaker_open", "3 of 3 calls failed")], {})
    assert cause
    assert cause.what == "source court is left alone: its breaker is open: 3 of 3 calls failed"
