"""Who may come in now: by how long requests queue, how much a caller submits, and how urgent it is. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn

from loanmesh.runtime.caller import proven
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import Overloaded, OverQuota
from services.intake.arrival import Arrivals, read_sent
from services.intake.quota import Quota

CLIENT_HEADER = "loanmesh-client"
DEFAULT_CLIENT = "local"
SENT_HEADER = "loanmesh-sent-ms"
"""Metadata: `SENDER:MS[:HELD]`, when the caller sent the call in milliseconds by a clock of its own that never jumps, a
name for that clock, and for how many milliseconds it held the call back. Absent: the queue there is unknown."""
INTERACTIVE = 1
QUEUE_SHARES = {1: 1.0, 2: 0.5}
"""Share of the longest queue delay at which a class is turned away, by priority: interactive, partner; others at a
quarter. What can wait goes first."""
OTHERS_SHARE = 0.25
URGENT_LIMITS_S = {2: 0.03}
URGENT_OTHERS_LIMIT_S = 0.025
"""The longest that requests may queue before the door in the mean while interactive submits come in, by priority as
above: for who is in a hurry, every call before the door is one more to wait for."""
URGENT_WITHIN_S = 1.0
"""How long after an interactive submit that holds."""
CROWDED_S, CROWDED_SHARE, CROWDED_FOR_S = 0.03, 0.2, 1.0
"""It is crowded, for a while, when so large a share of interactive submits queued before the door for so long."""
CROWDED_LIMITS_S = {2: 0.025}
CROWDED_OTHERS_LIMIT_S = 0.0125
"""Those limits while it is crowded. At all times they would turn bulk away at half load."""
CROWDED_WEIGHT = 0.05
"""Weight of the newest interactive submit in that share."""


class Admission:
    """The door of one replica.

    queue_s_max  how far behind storing may be before interactive submits are turned away, seconds.
    busy         whether the replica has little time to spare. Where it has, what delays calls is not of its making, and
                 neither fewer calls nor fewer decisions would help.
    """

    def __init__(
        self,
        queue_s_max: float,
        arrivals: Arrivals,
        quota: Quota,
        clock: Clock,
        busy: Callable[[], bool] = lambda: True,
    ) -> None:
        self._queue_s_max = queue_s_max
        self._arrivals = arrivals
        self._quota = quota
        self._clock = clock
        self._busy = busy
        self._urgent_at = self._crowded_at = float("-inf")
        self._crowded_share = 0.0

    def arrived(self, said: Mapping[str, str], size: str = "") -> tuple[str, float]:
        """Who calls, and for how long the call queued before we saw it, seconds. What is proven about the caller goes
        before what it says of itself in its metadata.

        size  names calls that take longer on their way than most, since they carry more.
        """
        who = proven()
        client = who.client if who else said.get(CLIENT_HEADER, DEFAULT_CLIENT)[:64]
        sent = read_sent(said.get(SENT_HEADER, ""))
        if sent is None:
            return client, 0.0
        now = self._clock.monotonic()
        sender, sent_at, held_s = sent
        self._arrivals.held_back(held_s, now)
        # By caller too: whoever learns another's name for its clock must not set it.
        return client, self._arrivals.delay_s(f"{client}/{sender}{size}", sent_at, now, usual=not size)

    def let_in(self, priority: int, before_s: float, behind_s: float = 0.0) -> None:
        """Whether one of this class may come in now. Raises Overloaded with when to come back.

        before_s, behind_s  how long this call queued before the door, and how long others do behind it, seconds.
        """
        now = self._clock.monotonic()
        if priority == INTERACTIVE:
            self._note_urgent(before_s, now)
        queued_s = max(before_s, behind_s)
        if queued_s > self._queue_s_max * QUEUE_SHARES.get(priority, OTHERS_SHARE):
            self._refuse(queued_s, yields=priority != INTERACTIVE and self.crowded())
        if priority != INTERACTIVE and now < self._urgent_at + URGENT_WITHIN_S and self._busy():
            usual_s = self._arrivals.usual_s(now)
            limit_s = URGENT_LIMITS_S.get(priority, URGENT_OTHERS_LIMIT_S)
            if crowded := self.crowded():
                limit_s = CROWDED_LIMITS_S.get(priority, CROWDED_OTHERS_LIMIT_S)
            if usual_s > limit_s:
                self._refuse(usual_s, yields=crowded)

    def _note_urgent(self, before_s: float, now: float) -> None:
        if now >= self._urgent_at + URGENT_WITHIN_S:
            self._crowded_share = 0.0  # What was so long ago says nothing of now.
        self._urgent_at = now
        queued = before_s > CROWDED_S
        self._crowded_share += (queued - self._crowded_share) * CROWDED_WEIGHT
        if queued and self._crowded_share > CROWDED_SHARE:
            self._crowded_at = now

    def _refuse(self, queued_s: float, *, yields: bool) -> NoReturn:
        # What a clock that stood still makes of a delay is no time for anybody to wait.
        retry_s = max(0.2, min(queued_s, 2 * self._queue_s_max))
        said = {"yields_to": "interactive"} if yields else {}
        raise Overloaded(f"storing is {queued_s:.2g} s behind; nothing was stored", retry_s, **said)

    def crowded(self) -> bool:
        """Whether interactive submits had to queue for us a moment ago, or those that come now will have to."""
        if not self._busy():
            return False
        now = self._clock.monotonic()
        queues = now < self._urgent_at + URGENT_WITHIN_S and self._arrivals.usual_s(now) > CROWDED_S
        return queues or now < self._crowded_at + CROWDED_FOR_S

    def pay(self, client: str, count: int) -> None:
        """Count so much work against the caller's quota. Raises OverQuota; then nothing is counted."""
        if retry_s := self._quota.take(client, count, self._clock.monotonic()):
            most = self._quota.allowance(client)
            raise OverQuota(
                f"client {client!r} submits more than its quota of {most.a_second:g} applications a second,"
                f" {most.burst} at once; nothing was stored; there is room again in {retry_s:.1f} s",
                retry_s,
            )
