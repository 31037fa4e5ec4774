"""One call of the client, whatever happens to it: repeated safely, within its deadline, never a storm."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from google.rpc import status_pb2
from lending.intake.v1 import intake_service_pb2 as pb
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from loanmesh.client import CallFailed, Client, Decided, Overloaded, Pending, Unreachable, calls
from loanmesh.client.transport import Failure
from loanmesh.runtime import deadline, errors
from loanmesh.runtime.budget import BudgetSettings
from loanmesh.runtime.channel import target_of
from loanmesh.runtime.errors import InvalidRequest, OverQuota
from loanmesh.runtime.gates import WELCOME_S
from loanmesh.runtime.status import item_status
from loanmesh.runtime.throttle import ThrottleSettings
from tests.builders import an_application
from tests.memory_mesh import MemoryMesh, away, busy
from tests.virtual import VirtualClock, run

CLOCK = VirtualClock()


def a_client(mesh: MemoryMesh, **options: Any) -> Client:
    return Client("", clock=CLOCK, dice=random.Random(1), transport=mesh, **options)


def using(mesh: MemoryMesh, work: Callable[[Client], Awaitable[Any]], **options: Any) -> Any:
    async def scenario() -> Any:
        async with a_client(mesh, **options) as client:
            return await work(client)

    return run(scenario())


def waits_s(mesh: MemoryMesh) -> list[float]:
    """Times between attempts."""
    return [later.at - earlier.at for earlier, later in zip(mesh.attempts, mesh.attempts[1:], strict=False)]


@pytest.mark.parametrize("fault", [away(), busy(), "lose", Failure("DEADLINE_EXCEEDED", ""), Failure("CANCELLED", "")])
def test_a_submit_that_failed_is_sent_again_with_its_request_id_and_stored_once(fault: Failure | str) -> None:
    mesh = MemoryMesh()
    mesh.faults.extend([fault, fault])
    stored = using(mesh, lambda client: client.submit(an_application()))
    ids = {attempt.request.request_id for attempt in mesh.attempts}
    assert len(mesh.attempts) == 3
    assert len(ids) == 1
    assert mesh.stored == dict.fromkeys(ids, 1)
    assert stored.name.endswith(ids.pop())


def test_every_change_may_be_sent_twice() -> None:
    mesh = MemoryMesh()

    async def twice(client: Client) -> list[pb.Application]:
        return [await client.submit(an_application(), request_id="request-1") for _ in range(2)]

    first, second = using(mesh, twice)
    assert first == second
    assert mesh.stored == {"request-1": 1}


def test_a_refusal_is_told_at_once_and_not_repeated() -> None:
    details = item_status(InvalidRequest(("application.loan", "must be there")))
    mesh = MemoryMesh(always=Failure("INVALID_ARGUMENT", details.message, None, details))
    with pytest.raises(CallFailed) as failed:
        using(mesh, lambda client: client.submit(an_application()))
    assert len(mesh.attempts) == 1
    assert failed.value.code == "INVALID_ARGUMENT"
    assert failed.value.reason == "INVALID_REQUEST"
    assert failed.value.violations == [("application.loan", "must be there")]


def test_waits_between_attempts_grow_and_are_jittered() -> None:
    mesh = MemoryMesh(always=away())
    with pytest.raises(Unreachable):
        using(mesh, lambda client: client.submit(an_application()), budget=BudgetSettings(reserve_per_s=100))
    waits = [wait - mesh.latency_s for wait in waits_s(mesh)[:5]]
    for number, wait in enumerate(waits):
        assert 0.05 * 2**number <= wait <= 0.1 * 2**number + 1e-9
    assert len(set(waits)) == len(waits)


def test_a_servers_wish_is_never_undercut() -> None:
    for seed in range(20):
        mesh = MemoryMesh()
        mesh.faults.append(busy(2.0))

        async def work(mesh: MemoryMesh = mesh, seed: int = seed) -> None:
            async with Client("", clock=CLOCK, dice=random.Random(seed), transport=mesh) as client:
                await client.submit(an_application())

        run(work())
        (wait,) = waits_s(mesh)
        assert 2.0 <= wait - mesh.latency_s <= 2.6


def test_a_server_that_wants_no_other_try_gets_none() -> None:
    mesh = MemoryMesh(always=busy(-0.001))
    with pytest.raises(Overloaded):
        using(mesh, lambda client: client.submit(an_application()))
    assert len(mesh.attempts) == 1


def test_a_wish_beyond_the_deadline_is_passed_on_at_once() -> None:
    mesh = MemoryMesh(always=busy(60.0))

    async def work(client: Client) -> float:
        with pytest.raises(Overloaded) as told:
            await client.submit(an_application(), request_id="request-1", deadline_s=2)
        assert 60 <= told.value.retry_s <= 78
        assert told.value.request_id == "request-1"
        return CLOCK.monotonic()

    assert using(mesh, work) == pytest.approx(mesh.latency_s)


@pytest.mark.parametrize("fault", ["hang", away(), busy()])
@pytest.mark.parametrize("wait_s", [0.0, 1.0])
def test_the_deadline_bounds_everything(fault: Failure | str, wait_s: float) -> None:
    mesh = MemoryMesh(always=fault)

    async def work(client: Client) -> float:
        with pytest.raises(Unreachable) as failed:
            await client.submit(an_application(), request_id="request-1", wait_s=wait_s, deadline_s=3)
        assert failed.value.request_id == "request-1"
        return CLOCK.monotonic()

    assert 1.0 < using(mesh, work) <= 3.0
    assert all(attempt.at + attempt.timeout_s <= 3.0 + 1e-9 for attempt in mesh.attempts)


def test_a_surrounding_calls_deadline_bounds_it_too() -> None:
    mesh = MemoryMesh(always="hang")

    async def work(client: Client) -> float:
        deadline.note(CLOCK.monotonic() + 1.5)
        with pytest.raises(Unreachable):
            await client.submit(an_application())
        return CLOCK.monotonic()

    assert using(mesh, work) <= 1.5


def test_an_attempt_leaves_time_for_another() -> None:
    attempts = calls.Attempts(first_s=1.0, most_s=5.0)
    assert [attempts.limit_s(number, 30.0) for number in range(5)] == [1, 2, 4, 5, 5]
    assert [attempts.limit_s(number, left_s) for number, left_s in ((0, 1.5), (1, 0.7), (2, 0.3), (3, 0.1))] == [
        0.75, 0.35, 0.25, 0.1
    ]  # fmt: skip


def test_no_attempt_is_given_less_than_answers_take() -> None:
    attempts = calls.Attempts(first_s=1.0, most_s=5.0)
    found = [attempts.limit_s(0, left_s, usual_s=0.6) for left_s in (4.0, 1.0, 0.5)]
    assert found == [1.0, 0.6, 0.5]
    assert attempts.limit_s(0, 60.0, usual_s=20.0) == 1.0  # However long they take, one that hangs costs a second.


def test_under_a_queue_of_a_third_of_a_second_calls_succeed_to_the_end_of_their_time() -> None:
    async def scenario() -> tuple[MemoryMesh, list[object]]:
        mesh = MemoryMesh(latency_s=0.3)
        async with Client("", clock=CLOCK, transport=mesh, throttle=ThrottleSettings(ceiling=2)) as client:
            submits = (client.submit(an_application(), deadline_s=2.0) for _ in range(300))
            return mesh, await asyncio.gather(*submits, return_exceptions=True)

    mesh, answers = run(scenario())
    stored = sum(isinstance(answer, pb.Application) for answer in answers)
    # The first two go alone; then sixteen in each of two places, as long as there is twice the time for an answer.
    assert stored == 2 + 2 * 16 * 4
    assert mesh.cancelled == 0  # Nothing was sent to be given up.


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("127.0.0.1:7401", "ipv4:127.0.0.1:7401"),
        ("127.0.0.1:7401,127.0.0.2:7401", "ipv4:127.0.0.1:7401,127.0.0.2:7401"),
        ("[::1]:7401,[::2]:7401", "ipv6:[::1]:7401,[::2]:7401"),
        ("intake:7401", "dns:///intake:7401"),
        ("dns:///intake:7401", "dns:///intake:7401"),
        ("unix:/run/intake", "unix:/run/intake"),
    ],
)
def test_an_address_is_given_the_way_people_write_it(address: str, target: str) -> None:
    assert target_of(address) == target


@pytest.mark.parametrize("wait_s", [0.0, 20.0])
def test_a_replica_that_hangs_costs_a_second_not_the_callers_patience(wait_s: float) -> None:
    mesh = MemoryMesh()
    mesh.faults.append("hang")
    using(mesh, lambda client: client.submit(an_application(), wait_s=wait_s))
    assert mesh.attempts[1].at < 1.2


def test_a_mesh_that_fails_every_call_gets_no_more_than_a_tenth_on_top_and_all_get_through_when_it_is_back() -> None:
    mesh = MemoryMesh(always=away())

    async def work(client: Client) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(30 * 40):
                group.create_task(client.submit(an_application()))
                await CLOCK.sleep(1 / 40)
            assert len(mesh.attempts) <= 1.1 * 30 * 40
            mesh.always = None
            returned_at = CLOCK.monotonic()
        assert CLOCK.monotonic() - returned_at < 5

    using(mesh, work, patience_s=60)
    assert len(mesh.stored) == 30 * 40
    assert set(mesh.stored.values()) == {1}


def test_a_retry_that_is_turned_away_unsent_costs_nothing() -> None:
    mesh = MemoryMesh()
    mesh.faults.extend([away()])

    async def work(client: Client) -> float:
        held = [await client._one.throttle.acquire(0, 1.0) for _ in range(client.in_flight_limit - 1)]
        call = asyncio.ensure_future(client.submit(an_application(), deadline_s=1.0))
        await CLOCK.sleep(0.01)
        held.append(await client._one.throttle.acquire(0, 1.0))  # The place that it had.
        before = client._calls.budget.balance
        with pytest.raises(Overloaded):
            await call
        return client._calls.budget.balance - before

    assert using(mesh, work) == pytest.approx(0.0, abs=0.3)  # What leaks in a second.
    assert len(mesh.attempts) == 1


def test_a_lone_caller_can_always_repeat() -> None:
    mesh = MemoryMesh()
    mesh.faults.extend([away()] * 8)
    using(mesh, lambda client: client.submit(an_application()))
    assert len(mesh.attempts) == 9


def test_a_cancelled_caller_cancels_the_call_and_frees_its_place() -> None:
    mesh = MemoryMesh(always="hang")

    async def work(client: Client) -> None:
        for wait_s in (0.0, 5.0):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await client.submit(an_application(), wait_s=wait_s)
        assert mesh.cancelled == 2
        assert mesh.under_way == client._one.throttle.in_flight == client._calls.open == 0

    using(mesh, work)


def test_a_propagator_that_breaks_leaves_nothing_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("no such propagator")

    monkeypatch.setattr("opentelemetry.propagate.inject", breaks)

    async def work(client: Client) -> None:
        with pytest.raises(RuntimeError, match="no such propagator"):
            await client.submit(an_application())
        assert client._one.throttle.in_flight == client._calls.open == 0

    using(MemoryMesh(), work)


def test_priority_caller_and_trace_travel_with_each_call() -> None:
    mesh = MemoryMesh()
    parent = trace.SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=trace.TraceFlags(1))

    async def work(client: Client) -> None:
        with trace.use_span(trace.NonRecordingSpan(parent)):
            for priority in (pb.PRIORITY_UNSPECIFIED, pb.PRIORITY_INTERACTIVE, pb.PRIORITY_PARTNER, pb.PRIORITY_BULK):
                application = an_application()
                application.priority = priority
                await client.submit(application)

    using(mesh, work, client_id="app")
    sent = [attempt.metadata for attempt in mesh.attempts]
    assert [m["loanmesh-priority"] for m in sent] == ["interactive", "interactive", "partner", "bulk"]
    assert {m["loanmesh-client"] for m in sent} == {"app"}
    assert all(f"{0xABC:032x}" in m["traceparent"] for m in sent)


def test_a_call_is_one_span_whatever_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    mesh = MemoryMesh()
    mesh.faults.extend([away(), Failure("NOT_FOUND", "no")])

    async def work(client: Client) -> None:
        with pytest.raises(CallFailed):
            await client.get("lenders/demo/applications/1")
        await client.submit(an_application())

    using(mesh, work)
    failed, good = exporter.get_finished_spans()
    assert failed.name == "lending.intake.v1.IntakeService/GetApplication"
    assert failed.attributes == {
        "rpc.system.name": "grpc", "rpc.method": failed.name, "rpc.status_code": "NOT_FOUND", "error.type": "NOT_FOUND",
    }  # fmt: skip
    assert [event.attributes["rpc.status_code"] for event in failed.events if event.attributes] == [
        "UNAVAILABLE", "NOT_FOUND"
    ]  # fmt: skip
    assert not failed.status.is_ok
    assert good.attributes
    assert good.attributes["rpc.status_code"] == "OK"
    assert f"{good.context.span_id:016x}" in mesh.attempts[-1].metadata["traceparent"]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_who_is_turned_away_tells_why_even_where_others_shared_the_call(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(sampler=TraceIdRatioBased(share))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    full = item_status(OverQuota("more than its quota", 60.0))
    mesh = MemoryMesh(always=Failure("RESOURCE_EXHAUSTED", full.message, 60.0, full))

    async def work(client: Client) -> None:
        told = await asyncio.gather(*(client.submit(an_application()) for _ in range(20)), return_exceptions=True)
        assert {type(one) for one in told} == {Overloaded}

    using(mesh, work)
    spans = exporter.get_finished_spans()
    assert len({span.context.trace_id for span in spans}) == 20
    answered = [span for span in spans if span.events]
    sent = sum(len(getattr(one.request, "requests", [one.request])) for one in mesh.attempts)
    assert len(answered) == sent > 1
    assert any(one.method == "BatchSubmitApplications" for one in mesh.attempts) is (share == 0)
    for span in answered:
        assert span.attributes
        assert span.attributes["loanmesh.reason"] == "OVER_QUOTA"
        assert span.attributes["loanmesh.cause"] == "more than its quota"


@pytest.mark.parametrize(("told", "company"), [({}, 3), ({"yields_to": "interactive"}, 1)])
def test_who_is_turned_away_for_those_in_a_hurry_comes_one_by_one(told: dict[str, str], company: int) -> None:
    status = item_status(errors.Overloaded("storing is 0.1 s behind", 0.01, **told))
    mesh = MemoryMesh()
    mesh.faults.extend([Failure("RESOURCE_EXHAUSTED", status.message, 0.01, status)] * 2)

    async def work(client: Client) -> None:
        application = an_application()
        application.priority = pb.PRIORITY_PARTNER
        await client.submit(application)
        await CLOCK.sleep(WELCOME_S + 0.1)
        throttle = client._one.throttle
        held = [await throttle.acquire(0, 1.0) for _ in range(throttle.limit.calls)]
        waiters = [asyncio.create_task(throttle.acquire(1, 60.0)) for _ in range(3)]
        await CLOCK.sleep(0)
        for permit in held:
            permit.release()
        assert (await waiters[0]).company == company
        for waiter in waiters:
            waiter.cancel()

    using(mesh, work)


def test_beyond_what_a_client_may_hold_new_calls_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "OPEN_MAX", 3)
    mesh = MemoryMesh()

    async def work(client: Client) -> list[object]:
        return await asyncio.gather(*(client.submit(an_application()) for _ in range(5)), return_exceptions=True)

    ends = using(mesh, work)
    assert [type(end) for end in ends] == [pb.Application] * 3 + [Overloaded] * 2


def test_a_call_whose_turn_would_come_too_late_is_turned_away_unsent() -> None:
    mesh = MemoryMesh(latency_s=0.8)

    async def work(client: Client) -> None:
        await client.submit(an_application(), deadline_s=10)
        first = asyncio.create_task(client.submit(an_application(), deadline_s=10))
        await CLOCK.sleep(0.1)
        started = CLOCK.monotonic()
        with pytest.raises(Overloaded) as told:
            await client.submit(an_application(), deadline_s=0.5)
        assert told.value.retry_s > 0.5
        assert CLOCK.monotonic() == started
        await first

    using(mesh, work, throttle=ThrottleSettings(initial=1, floor=1, ceiling=1))
    assert len(mesh.attempts) == 2


# --- Waiting for decisions ---


def test_who_waits_for_a_decision_does_not_hold_up_who_wants_to_store() -> None:
    mesh = MemoryMesh(decide_s=30)

    async def work(client: Client) -> float:
        waiting = [asyncio.create_task(client.submit(an_application(), wait_s=20)) for _ in range(50)]
        await CLOCK.sleep(1)
        await client.submit(an_application())
        took_s = CLOCK.monotonic()
        await asyncio.gather(*waiting)
        return took_s

    assert using(mesh, work, throttle=ThrottleSettings(initial=2, floor=2, ceiling=2)) < 1.1


def test_a_slow_decision_is_no_sign_of_a_queue() -> None:
    for early in (True, False):
        mesh = MemoryMesh(decide_s=5, queue_s=None, early=early)

        async def work(client: Client) -> int:
            await asyncio.gather(*(client.submit(an_application(), wait_s=20) for _ in range(20)))
            return client.in_flight_limit

        assert using(mesh, work, throttle=ThrottleSettings(initial=20)) >= 20


def test_submit_and_wait_answers_the_decision() -> None:
    answer = using(MemoryMesh(decide_s=1), lambda client: client.submit_and_wait(an_application(), deadline_s=2))
    assert isinstance(answer, Decided)
    assert answer.application.state == pb.Application.STATE_DECIDED


def test_submit_and_wait_answers_pending_with_its_estimate_by_the_deadline() -> None:
    mesh = MemoryMesh(decide_s=60)

    async def work(client: Client) -> None:
        answer = await client.submit_and_wait(an_application(), deadline_s=2, request_id="request-1")
        assert isinstance(answer, Pending)
        assert answer.request_id == "request-1"
        assert answer.estimate_at
        assert answer.estimate_at.timestamp() == 1_800_000_000
        assert CLOCK.monotonic() == pytest.approx(2.0)
        assert mesh.under_way == 0

    using(mesh, work)


def test_submit_and_wait_answers_pending_by_the_deadline_also_when_a_replica_hung_first() -> None:
    mesh = MemoryMesh(decide_s=60)
    mesh.faults.append("hang")
    answer = using(mesh, lambda client: client.submit_and_wait(an_application(), deadline_s=2))
    assert isinstance(answer, Pending)
    asked_s = [attempt.request.wait.ToNanoseconds() / 1e9 for attempt in mesh.attempts[:2]]
    assert asked_s[0] == pytest.approx(1.8)
    assert asked_s[1] < 2.0 - mesh.attempts[1].at


def test_a_long_page_is_no_sign_of_a_queue() -> None:
    mesh = MemoryMesh(queue_s=None)

    async def work(client: Client) -> int:
        await client.submit(an_application(), request_id="request-1")
        await client.get("lenders/demo/applications/request-1")
        mesh.latency_s = 0.5
        for _ in range(20):
            await client.list()
        assert client._rest.throttle.limit.calls >= 20
        for _ in range(20):
            await client.get("lenders/demo/applications/request-1")
        assert client.in_flight_limit >= 20, "submits have a limit of their own"
        return client._rest.throttle.limit.calls

    assert using(mesh, work, throttle=ThrottleSettings(initial=20)) == 2


def test_submit_and_wait_goes_on_by_watching() -> None:
    mesh = MemoryMesh(decide_s=70)
    answer = using(mesh, lambda client: client.submit_and_wait(an_application(), deadline_s=140))
    assert isinstance(answer, Decided)
    assert [attempt.method for attempt in mesh.attempts] == ["SubmitApplication", "WatchApplication"]


def test_submit_and_wait_answers_pending_where_watching_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = MemoryMesh(decide_s=200)

    async def work(client: Client) -> None:
        call = asyncio.create_task(client.submit_and_wait(an_application(), deadline_s=100))
        await CLOCK.sleep(1)
        monkeypatch.setattr(calls, "OPEN_MAX", 0)  # The watch is turned away at once, before it waits for anything.
        assert isinstance(await call, Pending)
        assert CLOCK.monotonic() == pytest.approx(60, abs=0.1)

    using(mesh, work)


def test_submit_and_wait_does_not_wait_for_people() -> None:
    mesh = MemoryMesh()

    async def work(client: Client) -> None:
        await client.submit(an_application(), request_id="request-1")
        mesh.decide(mesh.applications["request-1"], pb.Application.STATE_AWAITING_INFORMATION)
        answer = await client.submit_and_wait(an_application(), deadline_s=30, request_id="request-1")
        assert isinstance(answer, Pending)
        assert CLOCK.monotonic() < 1

    using(mesh, work)


def test_submit_and_wait_says_when_not_even_storing_was_confirmed() -> None:
    with pytest.raises(Unreachable):
        using(MemoryMesh(always=away()), lambda client: client.submit_and_wait(an_application(), deadline_s=2))


# --- Watching ---


def test_a_watch_goes_on_after_a_break_and_tells_each_change_once() -> None:
    mesh = MemoryMesh()

    async def work(client: Client) -> list[int]:
        stored = await client.submit(an_application())
        mesh.faults.extend(["lose", away(), "lose"])
        return [changed.revision async for changed in client.watch(stored.name)]

    assert using(mesh, work) == [1, 2]
    assert sum(attempt.method == "WatchApplication" for attempt in mesh.attempts) == 4


def test_a_watch_without_a_mesh_ends_after_the_patience_counted_from_the_break() -> None:
    mesh = MemoryMesh(decide_s=100)

    async def work(client: Client) -> float:
        stored = await client.submit(an_application())
        mesh.faults.append("lose")
        mesh.always = away()
        with pytest.raises(Unreachable):
            async for _ in client.watch(stored.name):
                pass
        return CLOCK.monotonic()

    assert 105 < using(mesh, work, patience_s=10) <= 110.1


def test_a_watch_of_nothing_is_refused() -> None:
    mesh = MemoryMesh(always=Failure("NOT_FOUND", "no", None, status_pb2.Status()))

    async def work(client: Client) -> None:
        with pytest.raises(CallFailed):
            await anext(client.watch("lenders/demo/applications/1"))

    using(mesh, work)


def test_a_watch_that_is_left_ends_its_call() -> None:
    mesh = MemoryMesh(decide_s=100)

    async def work(client: Client) -> None:
        stored = await client.submit(an_application())
        changes = client.watch(stored.name)
        await anext(changes)
        assert mesh.under_way == 1
        await changes.aclose()
        assert mesh.under_way == client._calls.open == 0

    using(mesh, work)
