"""Whether we may ask: no consent in force for this party, source and purpose, no query. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from lending.type.v1.party_pb2 import Consent, Party

CLOCK_SKEW_S = 300.0
"""How far ahead the clock of whoever took the consent may run."""


def has_consent(consents: Iterable[Consent], party: Party, source: str, now: dt.datetime) -> bool:
    """Whether the party's consent to ask the source for an assessment is in force at `now`."""
    return source in consented(consents, party, now)


def consented(consents: Iterable[Consent], party: Party, now: dt.datetime) -> set[str]:
    """The sources for which the party's consent to ask them for an assessment is in force at `now`.

    A consent without a role is the borrower's, and nobody else's. It ends at its expire_time, that moment excluded.
    """
    now_s = now.timestamp()
    return {
        consent.source
        for consent in consents
        if consent.purpose == Consent.PURPOSE_CREDIT_ASSESSMENT
        and (consent.party_role or Party.ROLE_BORROWER) == party.role
        and consent.given_time.seconds <= now_s + CLOCK_SKEW_S
        and (not consent.HasField("expire_time") or now_s < consent.expire_time.seconds)
    }
