"""Submits that share a call: only in a crowd, only with their like, and each as if it had gone alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.client import CallFailed, Client
from loanmesh.client.together import CROWD, HURRY_S, ITEM_BYTES_MAX, LINGER_S, Together
from loanmesh.client.transport import GET, SUBMIT, SUBMIT_MANY, Failure, Reply
from tests.builders import an_application
from tests.memory_mesh import Attempt, MemoryMesh, away
from tests.virtual import VirtualClock, run

CLOCK = VirtualClock()
ALONE, SHARED = "SubmitApplication", "BatchSubmitApplications"


def a_submit(number: int, wait_s: float = 0.0, **application: Any) -> pb.SubmitApplicationRequest:
    request = pb.SubmitApplicationRequest(parent="lenders/demo", request_id=f"request-{number}")
    request.application.CopyFrom(an_application())
    request.application.MergeFrom(pb.Application(**application))
    if wait_s:
        request.wait.FromNanoseconds(round(wait_s * 1e9))
    return request


def traceparent(number: int, flags: str = "00") -> str:
    return f"00-{number + 1:032x}-{number + 1:016x}-{flags}"


class Sending:
    """Sends through one Together; a crowd that hangs makes company wanted.

    heard  request_ids of those told that they are stored.
    """

    def __init__(self, mesh: MemoryMesh) -> None:
        self.mesh = mesh
        self.together = Together(mesh, CLOCK)
        self.heard: list[str] = []

    async def send(self, request: pb.SubmitApplicationRequest, trace: str = "", timeout_s: float = 5.0) -> Reply[Any]:
        metadata = (("loanmesh-client", "shop"), ("traceparent", trace)) if trace else (("loanmesh-client", "shop"),)
        if not request.HasField("wait"):
            return await self.together.unary(SUBMIT, request, timeout_s, metadata)
        heard = self.heard
        return await self.together.waiting(
            SUBMIT, request, timeout_s, metadata, 1.0, lambda _: heard.append(request.request_id)
        )

    async def crowd(self) -> list[asyncio.Task[Any]]:
        """As many that hang as may go alone."""
        self.mesh.faults.extend(["hang"] * CROWD)
        tasks = [asyncio.create_task(self.send(a_submit(1000 + number), timeout_s=1000.0)) for number in range(CROWD)]
        await CLOCK.sleep(0)
        return tasks

    @property
    def others(self) -> Sequence[Attempt]:
        """Calls beside the crowd's."""
        return self.mesh.attempts[CROWD:]


def beside_a_crowd(work: Callable[[Sending], Awaitable[Any]], mesh: MemoryMesh | None = None) -> Sending:
    """Run `work` where many are under way; answers what was sent."""

    async def scenario() -> Sending:
        sending = Sending(mesh or MemoryMesh())
        crowd = await sending.crowd()
        await work(sending)
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        return sending

    return run(scenario())


def test_a_few_go_alone_and_at_once() -> None:
    async def scenario() -> MemoryMesh:
        sending = Sending(MemoryMesh())
        await asyncio.gather(*(sending.send(a_submit(number)) for number in range(CROWD)))
        await sending.together.unary(GET, pb.GetApplicationRequest(name="lenders/demo/applications/request-1"), 1.0, ())
        return sending.mesh

    mesh = run(scenario())
    assert [attempt.method for attempt in mesh.attempts] == [ALONE] * CROWD + ["GetApplication"]
    assert {attempt.at for attempt in mesh.attempts[:CROWD]} == {0.0}


def test_a_crowd_shares_a_call_and_each_gets_its_own_answer() -> None:
    answers: list[Any] = []

    async def work(sending: Sending) -> None:
        submits = (sending.send(a_submit(n, channel=f"c{n}"), traceparent(n)) for n in range(2))
        answers.extend(await asyncio.gather(*submits))

    sending = beside_a_crowd(work)
    (call,) = sending.others
    assert call.method == SHARED
    assert call.at == pytest.approx(LINGER_S)
    # That of the newest, so that what becomes of the call as such is seen somewhere.
    assert call.metadata == {"loanmesh-client": "shop", "traceparent": traceparent(1)}
    assert [item.traceparent for item in call.request.requests] == [traceparent(n) for n in range(2)]
    assert [answer.response.application.channel for answer in answers] == ["c0", "c1"]
    assert {answer.queue_s for answer in answers} == {0.0}


def test_those_who_got_their_turn_together_go_as_one_call_crowd_or_not() -> None:
    mesh = MemoryMesh()
    held = [(("loanmesh-sent-ms", f"clock:1000:{ms}"),) for ms in (900, 500, 100)]

    async def scenario() -> None:
        together = Together(mesh, CLOCK)
        submits = (together.unary(SUBMIT, a_submit(n), 5.0, held[n], 3) for n in range(3))
        await asyncio.gather(*submits, together.unary(SUBMIT, a_submit(3), 5.0, ()))

    run(scenario())
    alone, call = sorted(mesh.attempts, key=lambda attempt: attempt.method, reverse=True)
    assert (alone.method, call.at, len(call.request.requests)) == (ALONE, 0.0, 3)
    # Sent at the same moment; the first of them was held back for longest, which intake wants to know.
    assert call.metadata["loanmesh-sent-ms"] == "clock:1000:900"


def test_who_cannot_share_a_call_gets_no_place_together() -> None:
    async def scenario() -> list[bool]:
        together = Together(MemoryMesh(), CLOCK)
        found = [together.shares]
        for flags in ("01", "00"):
            for number in range(20):
                await together.unary(SUBMIT, a_submit(number), 5.0, (("traceparent", traceparent(number, flags)),))
            found.append(together.shares)
        return [*found, Together(MemoryMesh(), CLOCK, crowd=1000).shares]

    assert run(scenario()) == [True, False, True, False]


def test_those_who_each_wait_for_another_time_get_no_place_together() -> None:
    async def scenario() -> bool:
        together = Together(MemoryMesh(), CLOCK)

        def submit(number: int) -> Awaitable[Any]:
            request = a_submit(number, wait_s=1.0 + number)
            return together.waiting(SUBMIT, request, 30.0, (), 1.0, lambda _: None, 16)

        await asyncio.gather(*(submit(number) for number in range(16)))
        return together.shares

    assert run(scenario()) is False


def test_half_of_those_under_way_go_without_waiting_for_more() -> None:
    async def work(sending: Sending) -> None:
        await asyncio.gather(*(sending.send(a_submit(n)) for n in range(CROWD - 1)))

    (call,) = beside_a_crowd(work).others
    assert (call.at, len(call.request.requests)) == (0.0, CROWD - 1)


def test_only_those_alike_share_a_call() -> None:
    async def work(sending: Sending) -> None:
        unlike = [
            a_submit(1), a_submit(2, priority=pb.PRIORITY_BULK), a_submit(3, wait_s=2.0), a_submit(4, wait_s=9.0),
        ]  # fmt: skip
        elsewhere = a_submit(5)
        elsewhere.parent = "lenders/other"
        await asyncio.gather(*(sending.send(one) for one in [*unlike, elsewhere]))

    # One that found no company goes alone.
    assert [call.method for call in beside_a_crowd(work).others] == [ALONE] * 5


def test_who_is_traced_in_full_large_or_in_a_hurry_goes_alone() -> None:
    async def work(sending: Sending) -> None:
        large = a_submit(2)
        large.application.waiting_for.append("x" * ITEM_BYTES_MAX)
        alone = (sending.send(a_submit(1), traceparent(1, "01")), sending.send(large))
        in_a_hurry = sending.send(a_submit(3), timeout_s=HURRY_S / 2)
        await asyncio.gather(*alone, in_a_hurry, sending.send(a_submit(4)), sending.send(a_submit(5)))

    assert [call.method for call in beside_a_crowd(work).others] == [ALONE, ALONE, ALONE, SHARED]


def test_what_is_wrong_with_one_is_its_own() -> None:
    results: list[Any] = []

    async def work(sending: Sending) -> None:
        submits = (sending.send(a_submit(1)), sending.send(a_submit(2, channel="bad")), sending.send(a_submit(3)))
        results.extend(await asyncio.gather(*submits, return_exceptions=True))

    sending = beside_a_crowd(work)
    assert len(sending.others) == 1
    assert isinstance(results[1], Failure)
    assert results[1].refusal().violations == [("application.channel", "is bad")]
    assert [result.response.application.name[-9:] for result in (results[0], results[2])] == ["request-1", "request-3"]


def test_a_call_that_fails_fails_each_of_them() -> None:
    results: list[Any] = []

    async def work(sending: Sending) -> None:
        sending.mesh.faults.append(away())
        results.extend(await asyncio.gather(*(sending.send(a_submit(n)) for n in range(3)), return_exceptions=True))

    beside_a_crowd(work)
    assert [result.code for result in results] == ["UNAVAILABLE"] * 3
    assert len({id(result) for result in results}) == 3


def test_each_gives_up_when_its_own_time_is_up() -> None:
    ended: dict[float, float] = {}

    async def work(sending: Sending) -> None:
        sending.mesh.faults.append("hang")
        began = CLOCK.monotonic()

        async def one(number: int, timeout_s: float) -> None:
            with pytest.raises(Failure, match="no answer within") as failed:
                await sending.send(a_submit(number), timeout_s=timeout_s)
            assert failed.value.code == "DEADLINE_EXCEEDED"
            ended[timeout_s] = CLOCK.monotonic() - began

        await asyncio.gather(one(1, 1.1), one(2, 1.9))

    sending = beside_a_crowd(work)
    assert len(sending.others) == 1
    assert ended == {1.1: pytest.approx(1.1), 1.9: pytest.approx(1.9)}


def test_a_call_that_nobody_waits_for_any_more_is_cancelled() -> None:
    async def work(sending: Sending) -> None:
        sending.mesh.faults.append("hang")
        tasks = [asyncio.create_task(sending.send(a_submit(n))) for n in range(3)]
        await CLOCK.sleep(1)
        for still_needed, task in zip((True, True, False), tasks, strict=True):
            assert sending.mesh.cancelled == 0
            task.cancel()
            await CLOCK.sleep(0.01)
            assert (sending.mesh.cancelled == 0) is still_needed

    assert len(beside_a_crowd(work).others) == 1


def test_who_gives_up_before_the_call_is_not_sent() -> None:
    async def work(sending: Sending) -> None:
        tasks = [asyncio.create_task(sending.send(a_submit(n))) for n in range(2)]
        await CLOCK.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    (call,) = beside_a_crowd(work).others
    assert (call.method, call.request.request_id) == (ALONE, "request-0")


def test_those_who_wait_hear_of_their_decisions_together() -> None:
    answers: list[Any] = []

    async def work(sending: Sending) -> None:
        submits = (sending.send(a_submit(1, wait_s=5.0)), sending.send(a_submit(2, wait_s=5.1)))
        answers.extend(await asyncio.gather(*submits))
        assert sending.heard == ["request-1", "request-2"]

    (call,) = beside_a_crowd(work).others
    assert call.request.wait.seconds == 5
    assert not any(item.HasField("wait") for item in call.request.requests)
    assert {answer.response.application.state for answer in answers} == {pb.Application.STATE_DECIDED}


PENDING, DECIDED = pb.Application.STATE_PENDING, pb.Application.STATE_DECIDED


@pytest.mark.parametrize(("then", "state"), [(None, DECIDED), (away(), PENDING), ("lose", PENDING)])
def test_one_that_is_not_decided_with_the_others_is_watched_and_never_submitted_again(then: Any, state: Any) -> None:
    answers: list[Any] = []

    async def work(sending: Sending) -> None:
        submits = [
            asyncio.create_task(sending.send(a_submit(number, wait_s=2.0, channel=channel)))
            for number, channel in ((1, "app"), (2, "slow"))
        ]
        await CLOCK.sleep(0.1)
        if then:
            sending.mesh.faults.append(then)
        answers.extend(await asyncio.gather(*submits))

    mesh = MemoryMesh(latency_s=0.01, decide_s=0.5)
    shared, watched = beside_a_crowd(work, mesh).others
    assert (shared.method, watched.method, mesh.stored["request-2"]) == (SHARED, "WatchApplication", 1)
    # What is stored is never told to be anything else, whatever becomes of watching it.
    assert [answer.response.application.state for answer in answers] == [DECIDED, state]


def test_watching_ends_with_the_wait() -> None:
    async def work(sending: Sending) -> None:
        began = CLOCK.monotonic()
        submits = (sending.send(a_submit(number, wait_s=2.0, channel="slow")) for number in (1, 2))
        answers = await asyncio.gather(*submits)
        assert CLOCK.monotonic() - began == pytest.approx(2.0)
        assert {answer.response.application.state for answer in answers} == {PENDING}

    beside_a_crowd(work, MemoryMesh(decide_s=1.5))


def test_one_that_is_stored_and_only_waits_makes_no_crowd() -> None:
    async def scenario() -> MemoryMesh:
        sending = Sending(MemoryMesh(decide_s=5.0))
        waiting = [asyncio.create_task(sending.send(a_submit(n, wait_s=9.0), timeout_s=9.0)) for n in range(CROWD)]
        await CLOCK.sleep(1.0)
        await asyncio.gather(sending.send(a_submit(10)), sending.send(a_submit(11)), *waiting)
        return sending.mesh

    assert {attempt.method for attempt in run(scenario()).attempts} == {ALONE}


def test_a_crowd_of_one_class_is_none_of_another() -> None:
    async def work(sending: Sending) -> None:
        await asyncio.gather(*(sending.send(a_submit(n, priority=pb.PRIORITY_BULK)) for n in range(2)))

    assert [call.method for call in beside_a_crowd(work).others] == [ALONE, ALONE]


class MixedUp(MemoryMesh):
    """Answers for others than it was asked about, or for too few."""

    def __init__(self, spoil: Callable[[Any], None]) -> None:
        super().__init__()
        self._spoil = spoil

    async def unary(self, method: Any, request: Any, *rest: Any) -> Reply[Any]:
        reply: Reply[Any] = await super().unary(method, request, *rest)
        if method is SUBMIT_MANY:
            self._spoil(reply.response.results)
        return reply


@pytest.mark.parametrize("spoil", [lambda r: r.reverse(), lambda r: r.pop(), lambda r: r[0].Clear()])
def test_nobody_gets_the_answer_of_another(spoil: Callable[[Any], None]) -> None:
    async def work(sending: Sending) -> None:
        answers = await asyncio.gather(*(sending.send(a_submit(n, channel=f"c{n}")) for n in range(2)))
        assert [answer.response.application.channel for answer in answers] == ["c0", "c1"]

    assert [call.method for call in beside_a_crowd(work, MixedUp(spoil)).others][:2] == [SHARED, ALONE]


def test_a_call_that_is_refused_for_good_is_made_for_each_alone() -> None:
    async def work(sending: Sending) -> None:
        sending.mesh.faults.append(Failure("INTERNAL", "one of them trips a bug"))
        await asyncio.gather(*(sending.send(a_submit(n)) for n in range(2)))
        await asyncio.gather(*(sending.send(a_submit(n)) for n in range(2, 4)))

    assert [call.method for call in beside_a_crowd(work).others] == [SHARED, ALONE, ALONE, SHARED]


def test_what_is_known_of_a_failure_is_told_to_each() -> None:
    failure = Failure("UNAVAILABLE", "the certificate expired", 1.5)
    failure.tls = "certificate_expired"
    again = failure.again()
    assert again is not failure
    assert (again.code, str(again), again.pushback_s, again.tls) == (
        "UNAVAILABLE", "the certificate expired", 1.5, "certificate_expired",
    )  # fmt: skip


def test_who_waits_for_company_is_cancelled_when_the_client_closes() -> None:
    async def work(sending: Sending) -> None:
        waiting = asyncio.create_task(sending.send(a_submit(1)))
        await CLOCK.sleep(0)
        await sending.together.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    assert not beside_a_crowd(work).others


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNIMPLEMENTED"])
def test_where_sharing_is_not_allowed_all_go_alone(code: str) -> None:
    async def work(sending: Sending) -> None:
        sending.mesh.faults.append(Failure(code, "not for you"))
        await asyncio.gather(*(sending.send(a_submit(n)) for n in range(2)))
        await asyncio.gather(*(sending.send(a_submit(n)) for n in range(2, 4)))

    assert [call.method for call in beside_a_crowd(work).others] == [SHARED] + [ALONE] * 4


def test_a_client_shares_calls_and_each_submit_is_repeated_for_itself() -> None:
    async def scenario() -> MemoryMesh:
        mesh = MemoryMesh()
        async with Client("", clock=CLOCK, transport=mesh) as client:
            for number in range(40):
                mesh.busy_items[f"request-{number:02}"] = number % 2
            # One by one at first, until the client may have many in flight.
            for _ in range(6):
                await asyncio.gather(*(client.submit(an_application()) for _ in range(64)))
            submits = (client.submit(an_application(), request_id=f"request-{number:02}") for number in range(40))
            await asyncio.gather(*submits)
            with pytest.raises(CallFailed, match="channel"):
                await asyncio.gather(*(client.submit(pb.Application(channel="bad")) for _ in range(64)))
        return mesh

    mesh = run(scenario())
    assert {mesh.stored[f"request-{number:02}"] for number in range(40)} == {1}
    assert any(len(attempt.request.requests) > 8 for attempt in mesh.attempts if attempt.method == SHARED)
