"""Many applications: each answered once, busy ones repeated, crashed runs resumed, and nothing read far ahead."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.client import CallFailed, Client, Refused, Submitted, Unreachable
from loanmesh.client import many as many_
from loanmesh.client.transport import Failure
from tests.memory_mesh import MemoryMesh, away, busy
from tests.virtual import VirtualClock, run

CLOCK = VirtualClock()


def an_application(number: int, channel: str = "app") -> pb.Application:
    """Small, so that thousands take no time."""
    application = pb.Application(channel=channel)
    application.loan.amount_fen = number + 1
    return application


def applications(count: int) -> Iterator[pb.Application]:
    return (an_application(number) for number in range(count))


def pairs(count: int) -> list[tuple[str, pb.Application]]:
    return [(f"request-{number}", an_application(number)) for number in range(count)]


def using(mesh: MemoryMesh, work: Callable[[Client], Awaitable[Any]], **options: Any) -> Any:
    async def scenario() -> Any:
        async with Client("", clock=CLOCK, dice=random.Random(1), transport=mesh, **options) as client:
            return await work(client)

    return run(scenario())


async def all_of(client: Client, source: many_.Source, **options: Any) -> list[many_.Result]:
    return [result async for result in client.submit_many(source, **options)]


def test_each_is_answered_once_and_stored_once() -> None:
    mesh = MemoryMesh()
    results = using(mesh, lambda client: all_of(client, applications(2345)))
    assert sorted(result.position for result in results) == list(range(2345))
    assert all(isinstance(r, Submitted) and r.application and r.name == r.application.name for r in results)
    assert len(mesh.stored) == 2345
    assert max(len(attempt.request.requests) for attempt in mesh.attempts) == 500


def test_the_callers_request_ids_are_kept() -> None:
    mesh = MemoryMesh()
    results = using(mesh, lambda client: all_of(client, pairs(10)))
    assert {(r.position, r.request_id) for r in results} == {(n, f"request-{n}") for n in range(10)}
    assert set(mesh.stored) == {f"request-{n}" for n in range(10)}


def test_bulk_is_the_priority_of_those_that_state_none() -> None:
    mesh = MemoryMesh()
    urgent = an_application(1)
    urgent.priority = pb.PRIORITY_INTERACTIVE
    using(mesh, lambda client: all_of(client, [("request-0", an_application(0)), ("request-1", urgent)]))
    assert [mesh.applications[f"request-{n}"].priority for n in (0, 1)] == [pb.PRIORITY_BULK, pb.PRIORITY_INTERACTIVE]
    assert mesh.attempts[0].metadata["loanmesh-priority"] == "bulk"


def test_a_refused_one_is_a_result_and_harms_no_other() -> None:
    mesh = MemoryMesh()
    source = [an_application(n, "bad" if n == 7 else "app") for n in range(20)]
    results = using(mesh, lambda client: all_of(client, source))
    (refused,) = [result for result in results if isinstance(result, Refused)]
    assert refused.position == 7
    assert (refused.error.code, refused.error.violations) == ("INVALID_ARGUMENT", [("application.channel", "is bad")])
    assert len(mesh.stored) == 19


def test_what_the_mesh_is_too_busy_for_is_sent_again_alone_and_later() -> None:
    mesh = MemoryMesh()
    mesh.busy_items.update({"request-3": 2, "request-5": 1})
    results = using(mesh, lambda client: all_of(client, pairs(10)))
    assert len(results) == 10
    sent = [[item.request_id for item in attempt.request.requests] for attempt in mesh.attempts]
    assert sent[1:] == [["request-3", "request-5"], ["request-3"]]
    assert mesh.attempts[1].at - mesh.attempts[0].at >= 0.5  # As the mesh asked.
    assert set(mesh.stored.values()) == {1}


@pytest.mark.parametrize("fault", [away(), busy(), "lose"])
def test_a_batch_that_failed_is_sent_again_and_stored_once(fault: Any) -> None:
    mesh = MemoryMesh()
    mesh.faults.extend([fault] * 3)
    results = using(mesh, lambda client: all_of(client, applications(1200)))
    assert sorted(result.position for result in results) == list(range(1200))
    assert set(mesh.stored.values()) == {1}


def test_several_batches_are_in_flight_as_many_as_the_mesh_likes() -> None:
    deepest: Counter[str] = Counter()

    class Watched(MemoryMesh):
        async def unary(self, *args: Any) -> Any:
            deepest["now"] = max(deepest["now"], self.under_way + 1)
            return await super().unary(*args)

    using(Watched(latency_s=0.2), lambda client: all_of(client, applications(12_000)))
    assert deepest["now"] >= 8
    deepest.clear()
    using(Watched(latency_s=0.2, queue_s=2.0), lambda client: all_of(client, applications(3_000)))
    assert deepest["now"] <= 2


def test_the_source_is_never_read_far_ahead_of_the_results() -> None:
    read = 0

    def counted() -> Iterator[pb.Application]:
        nonlocal read
        for application in applications(12_000):
            read += 1
            yield application

    async def work(client: Client) -> None:
        taken = furthest = 0
        async for _ in client.submit_many(counted()):
            taken += 1
            furthest = max(furthest, read - taken)
        assert taken == 12_000
        # Batches in flight, one ready to go, and one just answered.
        assert furthest <= (many_.BATCH_MAX * 18)

    using(MemoryMesh(), work)


def test_a_run_that_is_left_reads_and_sends_no_more() -> None:
    mesh = MemoryMesh()
    read = 0

    async def counted() -> AsyncIterator[pb.Application]:
        nonlocal read
        for application in applications(100_000):
            read += 1
            yield application

    async def work(client: Client) -> None:
        results = client.submit_many(counted())
        await anext(results)
        await results.aclose()
        before = read
        await CLOCK.sleep(10)
        assert read == before
        assert mesh.under_way == 0

    using(mesh, work)


def test_a_slow_source_does_not_hold_up_what_it_has_given() -> None:
    async def slow() -> AsyncIterator[pb.Application]:
        for application in applications(5):
            yield application
            await CLOCK.sleep(10)

    async def work(client: Client) -> list[float]:
        return [CLOCK.monotonic() async for _ in client.submit_many(slow())]

    times = using(MemoryMesh(), work)
    assert times == pytest.approx([0.01, 10.01, 20.01, 30.01, 40.01])


def test_a_source_that_fails_ends_the_run_with_its_error_after_what_it_gave() -> None:
    async def broken() -> AsyncIterator[pb.Application]:
        for application in applications(3):
            yield application
        raise OSError("disk is gone")

    mesh = MemoryMesh()
    seen: list[many_.Result] = []

    async def work(client: Client) -> None:
        async for result in client.submit_many(broken()):
            seen.append(result)

    with pytest.raises(OSError, match="disk is gone"):
        using(mesh, work)
    assert len(mesh.stored) == 3


def test_a_mesh_that_stays_away_ends_the_run_when_the_patience_does() -> None:
    async def work(client: Client) -> float:
        with pytest.raises(Unreachable):
            await all_of(client, applications(100))
        return CLOCK.monotonic()

    assert using(MemoryMesh(always=away()), work, patience_s=5) <= 5


def test_an_application_too_large_for_a_message_is_refused_alone() -> None:
    class Narrow(MemoryMesh):
        async def unary(self, method: Any, request: Any, *rest: Any) -> Any:
            if request.ByteSize() > 5_000_000:
                raise Failure("INVALID_ARGUMENT", "message larger than max")
            return await super().unary(method, request, *rest)

    source = [an_application(n, "x" * (6_000_000 if n == 3 else 1_500_000)) for n in range(6)]
    results = using(Narrow(), lambda client: all_of(client, source))
    assert [(r.position, type(r)) for r in sorted(results, key=lambda r: r.position)] == [
        (n, Refused if n == 3 else Submitted) for n in range(6)
    ]


def test_a_whole_batch_refused_ends_the_run() -> None:
    mesh = MemoryMesh(always=Failure("PERMISSION_DENIED", "not yours"))
    with pytest.raises(CallFailed, match="not yours"):
        using(mesh, lambda client: all_of(client, applications(2)))


# --- Resumed ---


@pytest.mark.parametrize("named", [True, False])
def test_a_crashed_run_goes_on_where_it_was_without_a_duplicate(tmp_path: Path, named: bool) -> None:
    mesh = MemoryMesh(queue_s=2.0)  # So that few batches are in flight when it crashes.
    source: list[Any] = pairs(3000) if named else list(applications(3000))

    async def crash(client: Client) -> None:
        taken = 0
        results = client.submit_many(source, resume=tmp_path / "run")
        async for _ in results:
            taken += 1
            if taken == 1100:
                break
        await results.aclose()

    using(mesh, crash)
    assert 1100 <= len(mesh.stored) < 3000
    before = len(mesh.attempts)
    results = using(mesh, lambda client: all_of(client, reversed(source), resume=tmp_path / "run"))
    assert sorted(result.position for result in results) == list(range(3000))
    assert len(mesh.stored) == 3000
    assert set(mesh.stored.values()) == {1}
    earlier = [result for result in results if isinstance(result, Submitted) and result.application is None]
    assert len(earlier) >= 1100
    sent = sum(len(attempt.request.requests) for attempt in mesh.attempts[before:])
    assert sent == 3000 - len(earlier)
    assert {result.name for result in results} == {a.name for a in mesh.applications.values()}


def test_what_was_stored_but_not_noted_is_sent_again_and_stored_once(tmp_path: Path) -> None:
    mesh = MemoryMesh(always="lose")
    for _ in range(2):
        with pytest.raises(Unreachable):
            using(mesh, lambda client: all_of(client, applications(700), resume=tmp_path / "run"), patience_s=3)
    mesh.always = None
    assert len(using(mesh, lambda client: all_of(client, applications(700), resume=tmp_path / "run"))) == 700
    assert len(mesh.stored) == 700


def test_a_finished_run_sends_nothing_when_repeated(tmp_path: Path) -> None:
    mesh = MemoryMesh()
    for _ in range(2):
        assert len(using(mesh, lambda client: all_of(client, applications(600), resume=tmp_path / "run"))) == 600
    assert sum(len(attempt.request.requests) for attempt in mesh.attempts) == 600


def test_another_file_is_another_run(tmp_path: Path) -> None:
    mesh = MemoryMesh()
    for name in ("november", "december"):
        using(mesh, lambda client, name=name: all_of(client, applications(10), resume=tmp_path / name))  # type: ignore[misc]  # A default binds it.
    assert len(mesh.stored) == 20


def test_a_file_of_somebody_else_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    mesh = MemoryMesh()
    using(mesh, lambda client: all_of(client, applications(1), resume=tmp_path / "run"))
    before = len(mesh.attempts)
    with pytest.raises(ValueError, match="belongs to lenders/demo and client local"):
        using(mesh, lambda client: all_of(client, applications(1), resume=tmp_path / "run"), client_id="other")
    (tmp_path / "text").write_text("no journal at all, but long enough to be mistaken for one" * 10)
    with pytest.raises(ValueError, match="name another"):
        using(mesh, lambda client: all_of(client, applications(1), resume=tmp_path / "text"))
    assert len(mesh.attempts) == before
