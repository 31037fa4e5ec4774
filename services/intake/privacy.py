"""What of an application is personal, and how it is kept: sealed under a data key of its own, found by keyed hash.

Sealed: the payload, as submitted and as it stands, decisions, profiles, scores, pricings. Kept readable, since lists,
claims and audits need them, and free of personal data: states, outcomes, grades, channels, times, events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.sealed import DataKey, Sealer, Unsealable, is_sealed

log = structlog.get_logger()


@dataclass(frozen=True)
class Cover:
    """The key of one application's content, and where that content belongs. No key: nothing of it is sealed."""

    name: str
    """`lenders/{lender}/applications/{id}`."""
    key: DataKey | None = field(default=None, repr=False)

    @property
    def key_id(self) -> str | None:
        """Which key of the ring the data key is wrapped with."""
        return self.key.key_id if self.key else None

    @property
    def wrapped(self) -> bytes | None:
        """The data key as it is stored."""
        return self.key.wrapped if self.key else None

    def seal(self, plain: bytes, column: str) -> bytes:
        """As it is stored in a column, e.g. `payload` or `evidence/1/score`."""
        return self.key.seal(plain, f"{self.name}/{column}") if self.key else plain

    def unseal(self, stored: bytes, column: str) -> bytes:
        """As it was before. What was erased is empty. Raises Unsealable, for a plain blob among sealed ones as well."""
        if not stored or (self.key is None and not is_sealed(stored)):
            return bytes(stored)
        if self.key is None or not is_sealed(stored):
            raise Unsealable(f"what is stored at {self.name}/{column} was not sealed for it")
        return self.key.unseal(stored, f"{self.name}/{column}")


class Privacy:
    """Covers for new and stored applications.

    seals  False: new applications are stored unsealed, for as long as replicas of a release before sealing run beside.
    """

    def __init__(self, sealer: Sealer, *, seals: bool = True) -> None:
        self.sealer = sealer
        self.seals = seals

    def new(self, lender: str, application_id: str) -> Cover:
        """For an application about to be stored."""
        name = name_of(lender, application_id)
        return Cover(name, self.sealer.new_key(name) if self.seals else None)

    def stored(self, lender: str, application_id: str, key_id: str | None, wrapped: bytes | None) -> Cover:
        """For one that is stored. Raises DependencyDown while its ring's key is not here, Unsealable."""
        name = name_of(lender, application_id)
        return Cover(name, None if key_id is None or wrapped is None else self.sealer.open_key(key_id, wrapped, name))

    def goal(self) -> str:
        """The keys that everything is to be kept under, and the day: whoever was behind is come back to in a day."""
        keys = self.sealer.keys
        return f"{keys.seal().id}|{keys.look_up().id}|{keys.now().date().isoformat()}"

    def look_up_id(self) -> str:
        """The key that fingerprints and subjects are hashed with now."""
        return self.sealer.keys.look_up().id

    def fingerprint(self, said: str) -> str:
        """As it is stored, to tell later whether the same is said again."""
        return self.sealer.fingerprint(said.encode())

    def is_same(self, fingerprint: str, said: str) -> bool:
        """Whether a stored fingerprint is that of `said`; one of before there were keys is `said` itself.

        One whose key is gone for good cannot be told from another: it counts as the same, since repeating is what
        callers do, and nothing is done twice for it.
        """
        if ":" not in fingerprint:
            return fingerprint == said
        try:
            return self.sealer.is_print_of(fingerprint, said.encode())
        except DependencyDown as gone:
            log.warning("fingerprint_unreadable", error=str(gone))
            return True

    def subjects(self, lender: str, numbers: Sequence[str]) -> list[str]:
        """Hashes to find an application by, one a party, of the key in use now."""
        return sorted({self.sealer.subject(lender, number) for number in numbers})


def name_of(lender: str, application_id: str) -> str:
    """An application's name."""
    return f"{lender}/applications/{application_id}"


PARTS = ("decision", "profile", "score", "pricing")
"""What an assessment is kept as."""


def part_of(assessment: int, part: str) -> str:
    """The column of one part of an assessment."""
    return f"assessments/{assessment}/{part}"
