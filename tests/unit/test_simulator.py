"""The simulator: its time, its processes, its network and its database; then whole runs, and bugs planted in them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest

from lab.simulator.database import DatabaseServer, blank
from lab.simulator.loop import Node, NodeClock, Stuck, VirtualLoop
from lab.simulator.mutants import MUTANTS, hunt
from lab.simulator.network import Channel, Network, Retry, Server
from lab.simulator.world import simulate
from loanmesh.runtime.channel import SERVICE_CONFIG
from loanmesh.runtime.database import Script, Statement
from loanmesh.runtime.errors import DependencyDown
from services.bureau.tables import metadata

SEEDS = 40
PLANTED = (
    "acknowledge_before_commit", "request_stored_twice", "claims_what_is_held", "declines_on_missing_evidence",
    "reads_from_a_cache", "calls_without_deadline", "watcher_misses_changes",
)  # fmt: skip


class Silent:
    """Is told of what must not happen, and remembers."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def violate(self, rule: str, application: str, text: str) -> None:
        self.told.append(rule)

    def trace(self, text: str) -> None:
        pass

    def stored(self, application_id: str, is_free: int) -> None:
        pass

    def looked_at(self, application_id: str, attempts: int) -> None:
        pass

    def mend(self, application_id: str) -> None:
        pass


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    virtual = VirtualLoop(random.Random(1))
    yield virtual
    virtual.end()


def run(loop: VirtualLoop, work: Callable[[], Awaitable[Any]], at_most_s: float = 1000.0) -> Any:
    async def main() -> Any:
        return await work()

    return loop.run_until(loop.spawn(loop.world, main()), at_most_s)


# --- Time and processes ---


def test_an_hour_of_sleep_takes_no_time(loop: VirtualLoop) -> None:
    run(loop, lambda: NodeClock(loop, loop.world).sleep(3600), at_most_s=4000)
    assert loop.now_s == 3600


def test_asyncio_s_own_timeouts_go_by_virtual_time(loop: VirtualLoop) -> None:
    async def impatient() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await NodeClock(loop, loop.world).sleep(60)
        return loop.now_s

    assert run(loop, impatient) == 5


def test_waiting_for_nobody_is_noticed(loop: VirtualLoop) -> None:
    with pytest.raises(Stuck, match="everybody waits"):
        run(loop, loop.create_future)


def test_a_killed_process_runs_nothing_more_not_even_its_finally(loop: VirtualLoop) -> None:
    done: list[str] = []
    node = loop.add_node("victim")
    clock = NodeClock(loop, node)

    async def works() -> None:
        try:
            done.append("begun")
            await clock.sleep(1)
            done.append("went on")
        finally:
            done.append("tidied up")

    loop.spawn(node, works())
    loop.post(loop.world, 0.5, loop.kill, node)
    run(loop, lambda: NodeClock(loop, loop.world).sleep(10))
    assert done == ["begun"]


def test_a_process_can_die_between_any_two_awaits(loop: VirtualLoop) -> None:
    seen = set()
    for callbacks in range(1, 6):
        steps: list[int] = []
        node = loop.add_node(f"victim-{callbacks}")
        node.die_after(callbacks)

        async def works(steps: list[int] = steps, clock: NodeClock = NodeClock(loop, node)) -> None:  # noqa: B008
            for step in range(10):
                steps.append(step)
                await clock.sleep(0.1)

        loop.spawn(node, works())
        run(loop, lambda: NodeClock(loop, loop.world).sleep(10))
        seen.add(len(steps))
    assert seen == {1, 2, 3}


def test_a_paused_process_goes_on_where_it_was(loop: VirtualLoop) -> None:
    node = loop.add_node("sleeper")
    woke: list[float] = []

    async def works() -> None:
        await NodeClock(loop, node).sleep(1)
        woke.append(loop.now_s)

    def set_paused(paused: bool) -> None:
        node.paused = paused

    loop.spawn(node, works())
    loop.post(loop.world, 0.5, set_paused, True)
    loop.post(loop.world, 7.0, set_paused, False)
    run(loop, lambda: NodeClock(loop, loop.world).sleep(10))
    assert woke == [7.0]


def test_a_clock_that_is_off_is_off_for_its_process_only(loop: VirtualLoop) -> None:
    one, other = loop.add_node("one"), loop.add_node("other")
    one.skew_s = 60
    assert (NodeClock(loop, one).now() - NodeClock(loop, other).now()).total_seconds() == 60
    assert NodeClock(loop, one).monotonic() == NodeClock(loop, other).monotonic()


# --- Network ---


class Through:
    """No interceptor."""

    async def intercept_service(self, find: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        return await find(details)


class Echo:
    """A server that answers what it is told to, and a channel to it."""

    def __init__(
        self, loop: VirtualLoop, answer: Callable[[bytes, Any], Awaitable[bytes]], retry: bool = False
    ) -> None:
        self.observer = Silent()
        self.network = Network(loop, random.Random(2), self.observer)
        self.node: Node = loop.add_node("echo-1")
        self.server = Server(self.network, self.node, "echo", Through())
        # Both ways bytes: nothing to be made of them.
        handler: Any = grpc.unary_unary_rpc_method_handler(answer, bytes, bytes)
        self.server.add_registered_method_handlers("test.Echo", {"Say": handler})
        self.server.listed = True
        channel = Channel(self.network, loop.world, "echo", Retry.of(SERVICE_CONFIG) if retry else None)
        self.say = channel.unary_unary("/test.Echo/Say", bytes, bytes)


def code_of(loop: VirtualLoop, call: Callable[[], Awaitable[Any]]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        run(loop, call)
    return caught.value.code()


async def repeat(request: bytes, context: Any) -> bytes:
    return request


def test_a_call_is_answered_after_a_while(loop: VirtualLoop) -> None:
    echo = Echo(loop, repeat)
    assert run(loop, lambda: echo.say(b"hello", timeout=1)) == b"hello"
    assert 0 < loop.now_s < 1


def test_a_call_that_gets_lost_ends_by_reset_or_deadline(loop: VirtualLoop) -> None:
    echo = Echo(loop, repeat)
    echo.network.weather.loss = 1.0
    codes = {code_of(loop, lambda: echo.say(b"hello", timeout=1)) for _ in range(20)}
    assert codes == {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


def test_a_request_may_arrive_twice_and_is_answered_once(loop: VirtualLoop) -> None:
    came: list[bytes] = []

    async def count(request: bytes, context: Any) -> bytes:
        came.append(request)
        return request

    echo = Echo(loop, count)
    echo.network.weather.duplicates = 1.0
    run(loop, lambda: echo.say(b"hello", timeout=1))
    run(loop, lambda: NodeClock(loop, loop.world).sleep(1))
    assert came == [b"hello", b"hello"]


def test_a_process_that_dies_resets_its_calls(loop: VirtualLoop) -> None:
    async def never(request: bytes, context: Any) -> bytes:
        await loop.create_future()
        return b""

    echo = Echo(loop, never)
    loop.post(loop.world, 0.5, loop.kill, echo.node)
    assert code_of(loop, lambda: echo.say(b"hello", timeout=60)) is grpc.StatusCode.UNAVAILABLE
    assert loop.now_s < 1


def test_a_channel_retries_as_its_service_config_says(loop: VirtualLoop) -> None:
    async def refuse(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "busy")
        return b""

    echo = Echo(loop, refuse, retry=True)
    assert code_of(loop, lambda: echo.say(b"hello", timeout=5)) is grpc.StatusCode.UNAVAILABLE
    assert echo.network.attempts["echo"] == SERVICE_CONFIG["methodConfig"][0]["retryPolicy"]["maxAttempts"]  # type: ignore[index]


def test_a_deadline_reaches_the_handler_and_ends_its_work(loop: VirtualLoop) -> None:
    left: list[float] = []
    ended: list[float] = []

    async def slow(request: bytes, context: Any) -> bytes:
        left.append(context.time_remaining())
        try:
            await NodeClock(loop, loop.world).sleep(60)
        finally:
            ended.append(loop.now_s)
        return b""

    echo = Echo(loop, slow)
    assert code_of(loop, lambda: echo.say(b"hello", timeout=2)) is grpc.StatusCode.DEADLINE_EXCEEDED
    run(loop, lambda: NodeClock(loop, loop.world).sleep(1))
    assert 1.9 < left[0] < 2
    assert 2 < ended[0] < 2.1


# --- Database ---


def a_database(loop: VirtualLoop) -> DatabaseServer:
    return DatabaseServer("test", blank(metadata, ""), loop, random.Random(3), Silent(), inline=True)


def put(number: int) -> Callable[[], Script[int]]:
    def script() -> Script[int]:
        row = ("lenders/demo", "subject", f"source-{number}", "{}", 1.0)
        yield Statement(
            "INSERT INTO source_answer (lender, subject_hash, source, answer, fetched_at) VALUES (?, ?, ?, ?, ?)", [row]
        )
        if number < 0:
            raise ValueError("a bad script")
        return number

    return script


def stored(database: DatabaseServer) -> int:
    return int(database.ask("SELECT count(*) FROM source_answer")[0][0])


def test_a_script_that_fails_leaves_nothing_behind(loop: VirtualLoop) -> None:
    database = a_database(loop)
    connection = database.connect(loop.world, "me")
    with pytest.raises(ValueError, match="bad"):
        run(loop, lambda: connection.run(put(-1)))
    assert run(loop, lambda: connection.run(put(1))) == 1
    assert stored(database) == 1


def test_a_database_that_dies_may_have_committed_what_it_never_answered(loop: VirtualLoop) -> None:
    ends = set()
    for seed in range(20):
        database = DatabaseServer("test", blank(metadata, ""), loop, random.Random(seed), Silent(), inline=True)
        connection = database.connect(loop.world, "me")
        loop.post(loop.world, 0.001, database.stop)
        try:
            run(loop, lambda c=connection: c.run(put(1)))  # type: ignore[misc]
            ends.add(("answered", stored(database)))
        except DependencyDown:
            ends.add(("refused", stored(database)))
    assert ends == {("answered", 1), ("refused", 1), ("refused", 0)}


# --- Whole runs ---


def test_the_mesh_keeps_its_promises_under_every_seed() -> None:
    broken = {seed: violations for seed in range(SEEDS) if (violations := simulate(seed).violations)}
    assert broken == {}


def test_one_seed_is_one_history_byte_for_byte() -> None:
    first = [simulate(seed).text for seed in range(5)]
    again = [simulate(seed).text for seed in reversed(range(5))]
    assert first == again[::-1]
    assert len(set(first)) == 5


def test_a_traced_run_tells_the_same_history() -> None:
    assert simulate(7, tracing=True).text == simulate(7).text


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str) -> None:
    assert hunt(name, seeds=100).seed is not None


def test_every_planted_bug_says_what_is_wrong_and_what_must_find_it() -> None:
    assert len(MUTANTS) >= 15
    assert all(plant.__doc__ and rules for plant, rules in MUTANTS.values())
