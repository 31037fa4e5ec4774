"""The intake RPCs: proto in, domain out, errors to status. Nothing is decided here."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import grpc
from lending.bureau.v1.bureau_service_pb2 import CreditProfile
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceServicer
from lending.pricing.v1.pricing_service_pb2 import Pricing, ScheduleRepaymentsResponse
from lending.scoring.v1.scoring_service_pb2 import Score
from lending.type.v1.offer_pb2 import Offer

from loanmesh.runtime.batching import Batcher
from loanmesh.runtime.caller import said
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.deadline import remaining_s
from loanmesh.runtime.errors import (
    DependencyDown,
    InvalidRequest,
    LoanmeshError,
    NotFound,
    Overloaded,
    RequestIdConflict,
    WrongState,
)
from loanmesh.runtime.status import item_status
from loanmesh.runtime.validation import violations
from loanmesh.runtime.vitals import Vitals
from services.intake import application as domain
from services.intake.admission import Admission
from services.intake.application import FINAL, New, Snapshot, State, Stored
from services.intake.estimate import Estimate
from services.intake.explain import Label, explain
from services.intake.outcomes import STRAGGLE_S, Outcomes
from services.intake.ports import Apply, Records
from services.intake.reception import Reception
from services.intake.replay import Replay
from services.intake.watch import Watch, WatchingAll
from services.intake.watchers import Watchers
from services.intake.worker import Worker

QUEUE_HEADER = "loanmesh-queue-ms"
"""Trailing metadata: how long the request waited here before it was stored, milliseconds; callers slow down by it."""
ACKNOWLEDGE_S = 0.2
"""A caller who waits for the decision hears by then that it is stored; most hear of the decision itself before."""
APART_S = 0.008
"""From one commit of new applications to the next, where there are several. In flight 64 at a time they came two a
commit, and each cost 0.63 ms of CPU; six milliseconds apart 0.41 ms. Whoever comes alone waits for nothing."""
BATCH_ITEMS_MAX = 500
"""As the contract says."""
SMALL_BATCH_ITEMS_MAX = 64
"""Up to so many, items of a batch are stored with those that come alone; more have a commit of their own, for which
nobody waits."""
THOROUGH_ITEMS_MAX = 10
"""Wrong items of a batch of which all faults are told; of further ones the first. To look for all costs milliseconds an
item, in which nobody else is served."""
_Context = grpc.aio.ServicerContext[Any, Any]
_Schedules = Callable[[Sequence[Offer]], Any]


class IntakeServicer(IntakeServiceServicer):
    """Answers callers from the store; hands what it accepts to the worker."""

    def __init__(
        self,
        store: Records,
        worker: Worker,
        watch: Watch,
        estimate: Estimate,
        schedules: _Schedules,
        replay: Replay,
        labels: Mapping[str, Label],
        clock: Clock,
        new_id: Callable[[], str],
        accepts_waiting_max: int,
        admission: Admission,
        traceparent: Callable[..., str] = lambda item="", _=False: item,
        reception: Reception | None = None,
        watches_max: int = 1000,
        is_sure: Callable[[], bool] = lambda: True,
        stored: Callable[[Sequence[New], float], None] = lambda *_: None,
    ) -> None:
        self._store = store
        self._stored = stored
        self._worker = worker
        self._watch = watch
        self._estimate = estimate
        self._schedules = schedules
        self._replay = replay
        self._labels = labels
        self._clock = clock
        self._new_id = new_id
        self._admission = admission
        self._traceparent = traceparent
        self._reception = reception or Reception(Vitals(), lambda *_: None)
        self._outcomes = Outcomes(store, watch, clock)
        self._watchers = Watchers(watches_max)
        self._is_sure = is_sure
        self._aside: set[asyncio.Task[Sequence[Stored]]] = set()
        self._aside_max = max(1, accepts_waiting_max // BATCH_ITEMS_MAX)
        self._accepts: Batcher[New, Stored] = Batcher(
            self._accept_batch,
            max_items=256,
            max_waiting=accepts_waiting_max,
            clock=clock,
            apart_s=APART_S,
            busy=lambda: worker.busy,
        )

    # --- In ---

    async def SubmitApplication(
        self, request: pb.SubmitApplicationRequest, context: _Context
    ) -> pb.SubmitApplicationResponse:
        """Store, acknowledge; wait for the decision where asked."""
        client, delay_s = self._admission.arrived(said())
        started = self._clock.monotonic()
        priority = request.application.priority or pb.PRIORITY_INTERACTIVE
        self._reception.offered((priority,))
        # Before anything is made of it: turning away must stay cheap when many are.
        self._admission.let_in(priority, delay_s, self._accepts.waited_s)
        new = self._new(request.parent, request, client, self._traceparent())
        self._admission.pay(client, 1)
        wait_s = request.wait.ToNanoseconds() / 1e9
        with self._watch(new.id) as watching:
            stored = await self._accept(new)
            took_s = delay_s + self._clock.monotonic() - started
            self._reception.acknowledged((new,), (stored,), took_s)
            queued = ((QUEUE_HEADER, f"{took_s * 1000:.0f}"),)
            context.set_trailing_metadata(queued)
            snapshot = await self._snapshot(stored, new)
            if wait_s > 0 and snapshot.state not in FINAL:
                left_s = remaining_s(self._clock.monotonic(), wait_s)
                final = await self._outcomes.of_one(stored, new, watching, min(ACKNOWLEDGE_S, left_s))
                if final is None and left_s > ACKNOWLEDGE_S:
                    # Tells the caller that it is stored: what is left is only waiting, and holds up nobody.
                    await context.send_initial_metadata(queued)
                    final = await self._outcomes.of_one(stored, new, watching, left_s - ACKNOWLEDGE_S)
                snapshot = final or await self._store.get(new.lender, stored.id)
        response = pb.SubmitApplicationResponse()
        await self._fill(response.application, snapshot)
        return response

    async def BatchSubmitApplications(
        self, request: pb.BatchSubmitApplicationsRequest, context: _Context
    ) -> pb.BatchSubmitApplicationsResponse:
        """Store many; each for itself."""
        small = len(request.requests) <= SMALL_BATCH_ITEMS_MAX
        client, delay_s = self._admission.arrived(said(), "" if small else "/many")
        started = self._clock.monotonic()
        priorities = [item.application.priority or pb.PRIORITY_INTERACTIVE for item in request.requests]
        self._reception.offered(priorities)
        # As the least urgent among them: one interactive item must not carry hundreds of others through the door.
        self._admission.let_in(max(priorities), delay_s, self._accepts.waited_s)
        response = pb.BatchSubmitApplicationsResponse()
        good: list[tuple[pb.BatchSubmitApplicationsResponse.Result, New]] = []
        wrong = 0
        for item in request.requests:
            result = response.results.add(request_id=item.request_id)
            try:
                sound = _checked(request.parent, item, thorough=wrong < THOROUGH_ITEMS_MAX)
                new = self._new(request.parent, sound, client, self._traceparent(item.traceparent, small))
                good.append((result, new))
            except LoanmeshError as error:
                wrong += 1
                result.error.CopyFrom(item_status(error))
        self._admission.pay(client, len(good))
        news = [new for _, new in good]
        wait_s = request.wait.ToNanoseconds() / 1e9
        with WatchingAll(self._watch, (new.id for new in news if wait_s)) as watching:
            stored = await self._accept_all(news)
            took_s = delay_s + self._clock.monotonic() - started
            self._reception.acknowledged(news, stored, took_s)
            fresh = {new.id: new for new, one in zip(news, stored, strict=True) if not one.existed}
            queued = ((QUEUE_HEADER, f"{took_s * 1000:.0f}"),)
            known: dict[str, Snapshot] = {}
            if wait_s and fresh:
                left_s = remaining_s(self._clock.monotonic(), wait_s)
                if len(fresh) < len(request.requests):
                    left_s = min(left_s, STRAGGLE_S)  # What is wrong, or was there before, has its answer now.
                known = await self._outcomes.of_all(fresh, watching, min(ACKNOWLEDGE_S, left_s))
                if not known and left_s > ACKNOWLEDGE_S:
                    await context.send_initial_metadata(queued)
                    known = await self._outcomes.of_all(fresh, watching, left_s - ACKNOWLEDGE_S)
            # As it is by now, where it is not as it was stored. One that cannot be read says so for itself, below.
            changed = [one.id for one in stored if one.id not in known and (wait_s or one.existed)]
            with contextlib.suppress(DependencyDown):
                known |= await self._store.get_many(changed)
        for (result, new), one in zip(good, stored, strict=True):
            try:
                await self._require_same(one, new)
                snapshot = known.get(one.id) or await self._snapshot(one, new)
            except LoanmeshError as error:
                # One that cannot be read, too, is an answer to its item alone.
                result.error.CopyFrom(item_status(error))
            else:
                await self._fill(result.application, snapshot)
        context.set_trailing_metadata(queued)
        return response

    def _new(self, parent: str, request: pb.SubmitApplicationRequest, client: str, traceparent: str) -> New:
        """The application as it will be stored. Raises InvalidRequest."""
        now = self._clock.now()
        if unsound := list(domain.unsound(request.application, now)):
            self._require_sure()
            raise InvalidRequest(*unsound)
        inputs = domain.inputs_of(request.application)
        payload = inputs.SerializeToString(deterministic=True)
        return New(
            id=self._new_id(),
            lender=parent,
            client_id=client,
            request_id=request.request_id,
            payload=payload,
            payload_hash=domain.digest(payload),
            priority=int(inputs.priority or pb.PRIORITY_INTERACTIVE),
            channel=inputs.channel,
            created_at=now.timestamp(),
            traceparent=traceparent,
            numbers=tuple(party.identity.value for party in inputs.parties),
        )

    def _require_sure(self) -> None:
        """Before a caller is refused by the time of day. Raises DependencyDown where nobody confirmed ours yet."""
        if not self._is_sure():
            raise DependencyDown("our clock is not compared with the database's yet; nothing was stored", retry_s=1.0)

    async def _accept(self, new: New) -> Stored:
        stored = await self._accepts.submit(new)
        await self._require_same(stored, new)
        return stored

    async def _require_same(self, stored: Stored, new: New) -> None:
        if stored.payload_hash == new.payload_hash:
            return
        before = pb.Application.FromString(await self._store.submitted(new.lender, stored.id))
        fields = ", ".join(domain.differing(before, pb.Application.FromString(new.payload)))
        raise RequestIdConflict(
            f"request_id {new.request_id} was used for {new.lender}/applications/{stored.id},"
            f" which differs in: {fields}",
            fields=fields,
        )

    async def _accept_batch(self, batch: Sequence[New]) -> Sequence[Stored]:
        room = [self._worker.has_room(new.priority, more) for more, new in enumerate(batch)]
        began = self._clock.monotonic()
        stored = await self._store.accept(list(zip(batch, room, strict=True)))
        self._stored(batch, began)
        self._worker.offer([one.claim for one in stored if one.claim])
        return stored

    async def _accept_all(self, batch: Sequence[New]) -> Sequence[Stored]:
        """Store a call's many."""
        if len(batch) <= SMALL_BATCH_ITEMS_MAX:
            return await self._accepts.submit_all(batch)
        if len(self._aside) >= self._aside_max:
            raise Overloaded(f"{len(self._aside)} batches are being stored already; nothing was stored", retry_s=0.5)
        return await asyncio.shield(self._accept_aside(batch))

    def _accept_aside(self, batch: Sequence[New]) -> asyncio.Task[Sequence[Stored]]:
        """In a task of its own: a caller who gives up must not leave rows leased to us that nobody works on."""

        async def accept() -> Sequence[Stored]:
            try:
                return await self._accept_batch(batch)
            finally:
                self._aside.discard(task)

        task = asyncio.create_task(accept())
        self._aside.add(task)
        return task

    async def _snapshot(self, stored: Stored, new: New) -> Snapshot:
        return await self._store.get(new.lender, stored.id) if stored.existed else domain.as_stored(new)

    # --- Reads ---

    async def GetApplication(self, request: pb.GetApplicationRequest, context: _Context) -> pb.GetApplicationResponse:
        """One application."""
        self._admission.arrived(said())  # What is learned of its clock serves when all are in a hurry.
        return pb.GetApplicationResponse(application=await self._read(request.name))

    async def ListApplications(
        self, request: pb.ListApplicationsRequest, context: _Context
    ) -> pb.ListApplicationsResponse:
        """A page."""
        self._admission.arrived(said())
        page, token = await self._store.page(
            request.parent, request.page_size or 50, request.page_token, request.filter, request.order_by
        )
        response = pb.ListApplicationsResponse(next_page_token=token)
        for snapshot in page:
            listed = await self._to_proto(snapshot)
            listed.decision.ClearField("reasons")
            response.applications.append(listed)
        return response

    async def WatchApplication(
        self, request: pb.WatchApplicationRequest, context: _Context
    ) -> AsyncIterator[pb.WatchApplicationResponse]:
        """Each change until the end."""
        client, _ = self._admission.arrived(said())
        with self._watchers.watching(client):
            async for snapshot in self._outcomes.changes(*_split(request.name)):
                yield pb.WatchApplicationResponse(application=await self._to_proto(snapshot))

    async def ListEvents(self, request: pb.ListEventsRequest, context: _Context) -> pb.ListEventsResponse:
        """A page of history, with the chain checked from its first event."""
        lender, application_id = _split(request.parent)
        events = await self._store.events(lender, application_id)
        if request.page_token and not (request.page_token.isascii() and request.page_token.isdecimal()):
            raise InvalidRequest(("page_token", "is not one that this service gave out"))
        start = int(request.page_token or 0)
        size = request.page_size or 100
        response = pb.ListEventsResponse(chain_intact=_intact(application_id, events))
        for event in events[start : start + size]:
            added = response.events.add(
                name=f"{request.parent}/events/{event.seq}",
                kind=event.kind,
                actor=event.actor,
                details=event.details,
                hash=event.hash,
            )
            _set_time(added.event_time, event.at)
        if start + size < len(events):
            response.next_page_token = str(start + size)
        return response

    async def ExplainDecision(
        self, request: pb.ExplainDecisionRequest, context: _Context
    ) -> pb.ExplainDecisionResponse:
        """From what was stored; schedules from pricing."""
        lender, application_id = _split(request.name)
        snapshot, stored = await self._decided_with_evidence(lender, application_id, request.assessment)
        decision = pb.Decision.FromString(stored[0])
        loan = pb.Application.FromString(snapshot.payload).loan
        summary_zh, summary_en = explain(decision, loan, self._labels)
        response = pb.ExplainDecisionResponse(
            decision=decision,
            loan=loan,
            profile=CreditProfile.FromString(stored[1]),
            score=Score.FromString(stored[2]),
            pricing=Pricing.FromString(stored[3]),
            summary_zh=summary_zh,
            summary_en=summary_en,
        )
        if request.include_schedules and decision.offers:
            schedules: ScheduleRepaymentsResponse = await self._schedules(decision.offers)
            for offer, schedule in zip(decision.offers, schedules.schedules, strict=True):
                response.schedules.add(offer_id=offer.offer_id, instalments=schedule.instalments)
        return response

    async def ReplayDecision(self, request: pb.ReplayDecisionRequest, context: _Context) -> pb.ReplayDecisionResponse:
        """Decide once more from what was stored."""
        lender, application_id = _split(request.name)
        snapshot, stored = await self._decided_with_evidence(lender, application_id, request.assessment)
        return await self._replay(snapshot, stored)

    async def _decided_with_evidence(
        self, lender: str, application_id: str, assessment: int
    ) -> tuple[Snapshot, tuple[bytes, bytes, bytes, bytes]]:
        snapshot = await self._store.get(lender, application_id)
        if snapshot.erased_at is not None:
            raise domain.erased(application_id, snapshot.erased_at)
        stored = await self._store.decision_with_evidence(lender, application_id, assessment)
        if stored is None:
            which = f"has no decided assessment {assessment}" if assessment else "is not decided"
            state = snapshot.state.shown
            raise WrongState(
                f"application {application_id} {which}; it is {state}; WatchApplication tells when it is",
                state=state.value,
            )
        return snapshot, stored

    # --- Changes ---

    async def SupplyInformation(
        self, request: pb.SupplyInformationRequest, context: _Context
    ) -> pb.SupplyInformationResponse:
        """Merge, and look again."""

        def apply(state: State, payload: Callable[[], bytes], _: object) -> dict[str, object]:
            domain.require_allowed("supply information to", application_id, state)
            merged = pb.Application.FromString(payload())
            merged.consents.extend(consent for consent in request.consents if consent not in merged.consents)
            merged.declaration.MergeFrom(request.declaration)
            merged.loan.product = request.product or merged.loan.product
            # The whole must be sound, not only what was added: two lists within bounds can be one beyond them.
            if unsound := [*violations(merged), *domain.unsound(merged, self._clock.now())]:
                raise InvalidRequest(*unsound)
            return {
                "payload": merged.SerializeToString(deterministic=True),
                "state": State.PENDING.value,
                "missing": "[]",
                "due_at": None,
                "not_before": 0.0,
                # What broke a stage before may be just what was replaced.
                "faults": 0,
            }

        if not (request.consents or request.HasField("declaration") or request.product):
            raise InvalidRequest(("consents", "supply consents, a declaration or a product"))
        # Each time the application is assessed again, which costs what a new one does.
        client, _ = self._admission.arrived(said())
        self._admission.pay(client, 1)
        _, application_id = _split(request.name)
        return pb.SupplyInformationResponse(application=await self._change(request, "information_supplied", {}, apply))

    async def AcceptOffer(self, request: pb.AcceptOfferRequest, context: _Context) -> pb.AcceptOfferResponse:
        """Accept one offer, while it is valid."""

        def apply(state: State, _: object, decided: Callable[[], bytes | None]) -> dict[str, object]:
            domain.require_allowed("accept an offer of", application_id, state)
            offers = {o.offer_id: o for o in pb.Decision.FromString(decided() or b"").offers}
            if request.offer_id not in offers:
                known = ", ".join(offers) or "none"
                raise NotFound(f"application {application_id} has no {request.offer_id}; its offers are: {known}")
            if offers[request.offer_id].expire_time.ToDatetime(dt.UTC) <= self._clock.now():
                what = f"{request.offer_id} of application {application_id}, which is {state},"
                raise WrongState(f"{what} is no longer valid; apply again", state=state.value)
            return {"state": State.OFFER_ACCEPTED.value, "accepted_offer": request.offer_id, "due_at": None}

        _, application_id = _split(request.name)
        details = {"offer": request.offer_id}
        return pb.AcceptOfferResponse(application=await self._change(request, "offer_accepted", details, apply))

    async def WithdrawApplication(
        self, request: pb.WithdrawApplicationRequest, context: _Context
    ) -> pb.WithdrawApplicationResponse:
        """Withdraw, before an offer is accepted."""

        def apply(state: State, *_: object) -> dict[str, object]:
            domain.require_allowed("withdraw", application_id, state)
            return {"state": State.WITHDRAWN.value, "due_at": None}

        _, application_id = _split(request.name)
        return pb.WithdrawApplicationResponse(application=await self._change(request, "withdrawn", {}, apply))

    async def _change(
        self,
        request: pb.SupplyInformationRequest | pb.AcceptOfferRequest | pb.WithdrawApplicationRequest,
        kind: str,
        details: dict[str, str],
        apply: Apply,
    ) -> pb.Application:
        lender, application_id = _split(request.name)
        said = {
            field.name: domain.digest(str(value).encode())[:16] if field.message_type else str(value)
            for field, value in request.ListFields()
            if field.name not in ("name", "request_id")
        }
        await self._store.change(lender, application_id, request.request_id, said, kind, details, apply)
        self._watch.changed([application_id])
        return await self._to_proto(await self._store.changed(lender, application_id))

    # --- Out ---

    async def _read(self, name: str) -> pb.Application:
        return await self._to_proto(await self._store.get(*_split(name)))

    async def _to_proto(self, snapshot: Snapshot) -> pb.Application:
        application = pb.Application()
        await self._fill(application, snapshot)
        return application

    async def _fill(self, application: pb.Application, snapshot: Snapshot) -> None:
        """The application as callers see it, in place: copying it into its answer costs as much again."""
        application.ParseFromString(snapshot.payload)
        application.name = f"{snapshot.lender}/applications/{snapshot.id}"
        application.state = pb.Application.State.Value(f"STATE_{snapshot.state.shown}")
        application.revision = snapshot.revision
        application.accepted_offer_id = snapshot.accepted_offer
        application.waiting_for.extend(snapshot.waiting_for)
        application.missing_information.extend(pb.MissingInformation(**missing) for missing in snapshot.missing)
        _set_time(application.create_time, snapshot.created_at)
        _set_time(application.update_time, snapshot.updated_at)
        if snapshot.due_at is not None:
            _set_time(application.due_time, snapshot.due_at)
        if snapshot.erased_at is not None:
            _set_time(application.erase_time, snapshot.erased_at)
        if snapshot.decision is not None:
            application.decision.ParseFromString(snapshot.decision)
        if snapshot.state == State.PENDING:
            start = max(snapshot.not_before, self._clock.now().timestamp())
            estimate_s = await self._estimate.seconds(snapshot.priority, snapshot.not_before)
            _set_time(application.estimate_time, start + estimate_s)
            if snapshot.revision == 1:
                self._estimate.told(snapshot.id, estimate_s)
        elif snapshot.state == State.PARKED:
            # Nobody works on it; what can be told is by when somebody will have looked.
            _set_time(application.estimate_time, max(snapshot.due_at or 0.0, self._clock.now().timestamp()))


def _checked(parent: str, item: pb.SubmitApplicationRequest, *, thorough: bool) -> pb.SubmitApplicationRequest:
    """An item of a batch under the batch's parent. Raises InvalidRequest as the item alone would have."""
    if item.parent not in ("", parent):
        raise InvalidRequest(("parent", f"must be empty or {parent}"))
    item.parent = parent
    if found := violations(item, thorough=thorough):
        raise InvalidRequest(*found)
    return item


def _split(name: str) -> tuple[str, str]:
    lender, application_id = name.split("/applications/")
    return lender, application_id


def _set_time(field: Any, seconds: float) -> None:
    field.FromNanoseconds(round(seconds * 1e6) * 1000)


def _intact(application_id: str, events: Sequence[domain.Happening]) -> bool:
    before = ""
    for number, event in enumerate(events, start=1):
        bare = domain.Happening(event.seq, event.kind, event.at, event.actor, event.details)
        if event.seq != number or event.hash != domain.chain(before, application_id, bare):
            return False
        before = event.hash
    return True
