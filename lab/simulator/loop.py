"""An event loop whose time is virtual and whose processes can die or freeze between any two awaits.

Time stands still while anybody can run, and jumps to the next timer when nobody can. Each callback belongs to the
*node* (the simulated process) during whose turn it was scheduled; as in a real process, a node's callbacks run in
order, and which node runs next is drawn. A node that is killed just never runs again: no `finally`, no `except`, as
after SIGKILL. A node that is paused keeps its callbacks until it goes on, as after SIGSTOP and SIGCONT.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import datetime as dt
import heapq
import logging
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
EPOCH = dt.datetime(2026, 11, 24, tzinfo=dt.UTC)
"""Virtual time begins here."""
EPOCH_S = EPOCH.timestamp()
HANDLES_MAX = 400_000
"""Callbacks a run may take. The busiest sound run takes a tenth; beyond, somebody runs in circles."""


class Stuck(Exception):
    """The run does not come to an end: nothing will ever happen again, or too much happens."""


class Node:
    """One simulated process (or the world outside), as the loop sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.left = False
        """Whether it ended of its own accord."""
        self.skew_s = 0.0
        """How far its clock of the day is off."""
        self.doomed = False
        """Whether callbacks are counted down to its death or its freezing."""
        self._dies_in: int | None = None
        self._freezes_in: int | None = None
        self.ready: deque[Handle] = deque()
        # All of them, to the end of the run: a dead process must not be tidied up by the garbage collector meanwhile.
        self.tasks: list[asyncio.Task[Any]] = []
        self.on_death: list[Callable[[], None]] = []

    def die_after(self, callbacks: int) -> None:
        """Be killed when so many more have run."""
        self._dies_in, self.doomed = callbacks, True

    def freeze_after(self, callbacks: int | None) -> None:
        """Be paused when so many more have run; None: not, after all."""
        self._freezes_in = callbacks
        self.doomed = callbacks is not None or self._dies_in is not None

    def count_down(self) -> bool:
        """One more has run; whether it dies of it. Between two awaits, wherever the process happens to be."""
        if self._freezes_in is not None:
            self._freezes_in -= 1
            if self._freezes_in <= 0:
                self.paused = True
                self.freeze_after(None)
        if self._dies_in is not None:
            self._dies_in -= 1
        return self._dies_in is not None and self._dies_in <= 0


class Handle:
    """A callback to come; may be cancelled."""

    __slots__ = ("args", "callback", "context", "dropped", "node", "when")

    def __init__(
        self, node: Node, when: float, callback: Callable[..., object], args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> None:  # fmt: skip
        self.node = node
        self.when = when
        self.callback = callback
        self.args = args
        # An empty context is false, and means empty.
        self.context = contextvars.copy_context() if context is None else context
        self.dropped = False

    def cancel(self) -> None:
        """Do not call."""
        self.dropped = True

    def cancelled(self) -> bool:
        """Whether it will not be called."""
        return self.dropped


class VirtualLoop:
    """What asyncio needs of a loop, and no more: no sockets, no threads, no signals."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._timers: list[tuple[float, float, int, Handle]] = []
        self._count = 0
        self._ended = False
        self.now_s = 0.0
        """Seconds since the run began, everywhere the same."""
        self.handles = 0
        """Callbacks run so far."""
        self.handles_max = HANDLES_MAX
        self.world = Node("world")
        self.current = self.world
        self.nodes = [self.world]
        self._asyncio: Any = self  # It knows loops by what they can do.
        self._buried: list[Node] = []

    # --- Nodes ---

    def add_node(self, name: str) -> Node:
        """A process that is just being started."""
        node = Node(name)
        self.nodes.append(node)
        return node

    def spawn(self, node: Node, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine in a process."""
        with self.on(node):
            return self.create_task(work, context=contextvars.Context())

    def kill(self, node: Node) -> None:
        """End a process at once: nothing of it runs again."""
        if not node.alive:
            return
        node.alive = False
        node.ready.clear()
        self.nodes.remove(node)
        self._buried.append(node)
        with self.on(self.world):
            for hook in node.on_death:
                hook()

    @contextlib.contextmanager
    def on(self, node: Node) -> Iterator[None]:
        """What is scheduled inside belongs to `node`."""
        before, self.current = self.current, node
        try:
            yield
        finally:
            self.current = before

    def post(self, node: Node, delay_s: float, callback: Callable[..., object], *args: Any) -> Handle:
        """Call something in another process after a while; nothing happens where that process is dead by then."""
        return self._at(node, self.now_s + delay_s, callback, args, contextvars.Context())

    # --- Running ---

    def run_until(self, task: asyncio.Task[T], at_most_s: float) -> T:
        """Run until the task is done. Raises Stuck when that cannot be."""
        previous = asyncio._get_running_loop()
        asyncio._set_running_loop(self._asyncio)
        try:
            while not task.done():
                runnable = [node for node in self.nodes if node.ready and not node.paused]
                if not runnable:
                    self._next_timer(at_most_s)
                elif len(runnable) == 1:
                    self._turn(runnable[0])
                else:
                    self._turn(runnable[int(self._dice.random() * len(runnable))])
        finally:
            asyncio._set_running_loop(previous)
        return task.result()

    def _turn(self, node: Node) -> None:
        """One round of a process: what is ready now, not what becomes so meanwhile."""
        self.current = node
        ready = node.ready
        count = len(ready)
        self.handles += count
        for _ in range(count):
            handle = ready.popleft()
            if handle.dropped:
                continue
            handle.context.run(handle.callback, *handle.args)
            if node.doomed and node.count_down():
                self.kill(node)
            if node.paused or not node.alive:
                break
        self.current = self.world
        if self.handles > self.handles_max:
            raise Stuck(f"{self.handles_max} callbacks, the last for {node.name}, and no end")

    def _next_timer(self, at_most_s: float) -> None:
        if not self._timers:
            raise Stuck("everybody waits for somebody")
        when, _, _, handle = heapq.heappop(self._timers)
        if handle.dropped or not handle.node.alive:
            return
        if when > at_most_s:
            raise Stuck(f"not done after {at_most_s:g} s")
        self.now_s = max(self.now_s, when)
        handle.node.ready.append(handle)

    def end(self) -> None:
        """Throw everything away, now: what is suspended is closed here, with nowhere to go, not by chance later."""
        self._ended = True
        self._timers.clear()
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        tracing, previous = logging.getLogger("opentelemetry.context"), asyncio._get_running_loop()
        tracing.disabled = True  # It complains of each span that is closed from outside its context.
        asyncio._set_running_loop(self._asyncio)
        filters = warnings.filters[:]
        warnings.simplefilter("ignore", RuntimeWarning)  # Of coroutines that were never begun.
        try:
            for node in [*self.nodes, *self._buried]:
                node.ready.clear()
                node.on_death.clear()
                for task in node.tasks:
                    if not task.done():
                        task._log_destroy_pending = False  # type: ignore[attr-defined]  # Private, and meant for this.
                        with contextlib.suppress(RuntimeError, ValueError):
                            task.get_coro().close()
                node.tasks.clear()
            self.nodes.clear()
            self._buried.clear()
        finally:
            asyncio._set_running_loop(previous)
            warnings.filters[:] = filters  # type: ignore[index]  # A list, whatever its stub says.
            tracing.disabled = False
            sys.unraisablehook = hook

    def failed_tasks(self) -> Iterator[BaseException]:
        """What ended tasks that nobody waited for: a loop of a service that died unseen."""
        # Of who died suddenly, nobody knows what it would still have noticed.
        for node in [*self.nodes, *(node for node in self._buried if node.left)]:
            for task in node.tasks:
                if task.done() and not task.cancelled() and getattr(task, "_log_traceback", False):
                    error = task.exception()
                    assert error is not None
                    yield error

    # --- What asyncio calls ---

    def _at(
        self, node: Node, when: float, callback: Callable[..., object], args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> Handle:  # fmt: skip
        handle = Handle(node, when, callback, args, context)
        if self._ended:
            return handle
        self._count += 1
        # Drawn second key: timers of the same moment go off in any order.
        heapq.heappush(self._timers, (when, self._dice.random(), self._count, handle))
        return handle

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        """Run in this process's next round."""
        node = self.current
        handle = Handle(node, self.now_s, callback, args, context)
        if node.alive and not self._ended:
            node.ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        """Run in this process after `delay` seconds."""
        return self._at(self.current, self.now_s + delay, callback, args, context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        """Run in this process at `when`."""
        return self._at(self.current, when, callback, args, context)

    def time(self) -> float:
        """Virtual seconds."""
        return self.now_s

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return asyncio.Future(loop=self._asyncio)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        """A task of this process."""
        task = asyncio.Task(coro, loop=self._asyncio, name=name or "task", context=context)
        self.current.tasks.append(task)
        return task

    def get_debug(self) -> bool:
        """No debug mode: it would read the real clock."""
        return False

    def is_running(self) -> bool:
        """As far as asyncio is concerned."""
        return True

    def is_closed(self) -> bool:
        """Whether the run is over."""
        return self._ended

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Told of exceptions nobody waited for, when they are collected; the run looks for them itself."""


class NodeClock:
    """A process's clock: everybody's seconds, its own time of day."""

    def __init__(self, loop: VirtualLoop, node: Node) -> None:
        self._loop = loop
        self._node = node

    def now(self) -> dt.datetime:
        """The time of day as this process believes it, UTC."""
        return EPOCH + dt.timedelta(seconds=self._loop.now_s + self._node.skew_s)

    def monotonic(self) -> float:
        """Virtual seconds."""
        return self._loop.now_s

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""
        future = self._loop.create_future()
        handle = self._loop.call_later(seconds, _wake, future)
        try:
            await future
        finally:
            handle.cancel()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
