"""How long the content of an application is kept, and by which rule. Pure.

Sources, as researched, no legal advice: the personal information protection law (PIPL) has content kept for the
shortest time its purpose needs (article 19) and erased when its purpose is reached or the person asks (article 47),
unless a law sets a longer time. The anti-money-laundering law has identity and transaction records of a business
relationship kept for at least ten years. How long a refused application is kept is the lender's own choice: long enough
to answer an objection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field

from services.intake.application import State

DAY_S = 86400.0


class RetentionSettings(BaseModel, frozen=True, extra="forbid"):
    """How long the content of closed applications is kept, days after they were closed."""

    erases: bool = True
    """Whether content is erased by itself when its time is over."""
    accepted_days: Annotated[float, Field(ge=1)] = 3653.0
    """Where an offer was accepted. Must be kept until then: anti-money-laundering law, ten years at least."""
    declined_days: Annotated[float, Field(ge=1)] = 1096.0
    """Where it was declined. The lender's choice, three years, as records of impact assessments are kept (PIPL 56);
    erased earlier where its applicant asks (PIPL 47)."""
    ended_days: Annotated[float, Field(ge=1)] = 180.0
    """Where it was withdrawn, or expired. The lender's choice: as short as its purpose needs (PIPL 19)."""
    history_days: Annotated[float, Field(ge=1)] = 1827.0
    """How long the erased row and its history, which hold nothing personal, are kept after the content was erased."""


@dataclass(frozen=True)
class Standing:
    """What of an application decides how long it is kept. Times are seconds since 1970."""

    state: State
    updated_at: float
    due_at: float | None


@dataclass(frozen=True)
class Keep:
    """Why content may not be erased yet. until  None: until somebody closes it."""

    rule: str
    because: str
    until: float | None


OPEN = Keep("open", "it is open; decide or withdraw it first", None)


def must_keep(one: Standing, settings: RetentionSettings, now_s: float) -> Keep | None:
    """Why an application must be kept although its applicant asks for erasure; None where it may be erased."""
    match one.state:
        case State.OFFER_ACCEPTED:
            until = one.updated_at + settings.accepted_days * DAY_S
            because = "an offer was accepted: records of the business relationship (anti-money-laundering law)"
            return Keep("loan_records", because, until) if until > now_s else None
        case State.DECIDED if one.due_at is not None and one.due_at > now_s:
            return Keep("offer_valid", "its offers can still be accepted; withdraw it first", one.due_at)
        case State.DECIDED | State.WITHDRAWN | State.EXPIRED:
            return None
    return OPEN


def over(settings: RetentionSettings, now_s: float) -> dict[State, float]:
    """Of each closed state, before when (seconds since 1970) it must have been closed to be erased by itself."""
    return {
        State.OFFER_ACCEPTED: now_s - settings.accepted_days * DAY_S,
        State.DECIDED: now_s - settings.declined_days * DAY_S,
        State.WITHDRAWN: now_s - settings.ended_days * DAY_S,
        State.EXPIRED: now_s - settings.ended_days * DAY_S,
    }
