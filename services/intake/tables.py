"""The tables intake owns; nobody else reads them. Migrations must lead to exactly these (a test compares)."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, LargeBinary, MetaData, Text, UniqueConstraint, text
from sqlmodel import Field, SQLModel

metadata = MetaData()
KEPT = "erased_at IS NULL AND state <> 'PENDING'"


class Table(SQLModel):
    """Base with this service's own metadata."""

    metadata = metadata


def _text(**more: bool) -> Column[str]:
    return Column(Text, **{"nullable": False, **more})  # type: ignore[arg-type]


def _count() -> Column[int]:
    return Column(BigInteger, nullable=False)


def _seconds(**more: bool) -> Column[float]:
    return Column(Double, **{"nullable": False, **more})  # type: ignore[arg-type]


class ApplicationRow(Table, table=True):
    """One application as it stands. Times are seconds since 1970, UTC."""

    __tablename__ = "application"
    __table_args__ = (
        UniqueConstraint("lender", "client_id", "request_id", name="application_request"),
        # Only open rows: finished ones, soon the most, cost the claim nothing.
        Index(
            "application_open",
            "priority",
            "not_before",
            sqlite_where=text("state = 'PENDING'"),
            postgresql_where=text("state = 'PENDING'"),
        ),
        # One place in five goes by age alone.
        Index(
            "application_aged",
            "not_before",
            sqlite_where=text("state = 'PENDING'"),
            postgresql_where=text("state = 'PENDING'"),
        ),
        Index("application_listed", "lender", "created_at", "id"),
        Index(
            "application_due",
            "due_at",
            sqlite_where=text("due_at IS NOT NULL"),
            postgresql_where=text("due_at IS NOT NULL"),
        ),
        # What there is to erase, oldest first, and histories to delete. Open rows are in neither.
        Index("application_kept", "state", "updated_at", sqlite_where=text(KEPT), postgresql_where=text(KEPT)),
        Index(
            "application_erased",
            "erased_at",
            sqlite_where=text("erased_at IS NOT NULL"),
            postgresql_where=text("erased_at IS NOT NULL"),
        ),
        Index(
            "application_parked",
            "updated_at",
            "id",
            sqlite_where=text("state = 'PARKED'"),
            postgresql_where=text("state = 'PARKED'"),
        ),
    )
    id: str = Field(sa_column=_text(primary_key=True))
    lender: str = Field(sa_column=_text())
    client_id: str = Field(sa_column=_text())
    request_id: str = Field(sa_column=_text())
    payload: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    payload_hash: str = Field(sa_column=_text())
    priority: int = Field(sa_column=_count())
    channel: str = Field(sa_column=_text())
    state: str = Field(sa_column=_text())
    outcome: str | None = Field(sa_column=_text(nullable=True))
    grade: str | None = Field(sa_column=_text(nullable=True))
    owner: str | None = Field(sa_column=_text(nullable=True))
    fence: int = Field(sa_column=_count())
    lease_until: float | None = Field(sa_column=_seconds(nullable=True))
    attempts: int = Field(sa_column=_count())
    not_before: float = Field(sa_column=_seconds())
    waiting_for: str = Field(sa_column=_text())
    missing: str = Field(sa_column=_text())
    due_at: float | None = Field(sa_column=_seconds(nullable=True))
    assessment: int = Field(sa_column=_count())
    accepted_offer: str = Field(sa_column=_text())
    revision: int = Field(sa_column=_count())
    event_hash: str = Field(sa_column=_text())
    created_at: float = Field(sa_column=_seconds())
    updated_at: float = Field(sa_column=_seconds())
    traceparent: str = Field(sa_column=Column(Text, nullable=False, server_default=""))
    lost_lease: str = Field(sa_column=Column(Text, nullable=False, server_default=""))
    original: bytes | None = Field(sa_column=Column(LargeBinary, nullable=True))
    faults: int = Field(sa_column=Column(BigInteger, nullable=False, server_default="0"))
    key_id: str | None = Field(sa_column=_text(nullable=True))
    data_key: bytes | None = Field(sa_column=Column(LargeBinary, nullable=True))
    look_up_id: str | None = Field(sa_column=_text(nullable=True))
    erased_at: float | None = Field(sa_column=_seconds(nullable=True))


class SubjectRow(Table, table=True):
    """Which applications a person or firm is party to, by keyed hash of the identity number."""

    __tablename__ = "subject"
    lender: str = Field(sa_column=_text(primary_key=True))
    subject_hash: str = Field(sa_column=_text(primary_key=True))
    application_id: str = Field(sa_column=_text(primary_key=True))


class ChoreRow(Table, table=True):
    """How far a long pass over the table has come, and which replica is at it."""

    __tablename__ = "chore"
    name: str = Field(sa_column=_text(primary_key=True))
    place: str = Field(sa_column=_text())
    told: str = Field(sa_column=_text())
    owner: str = Field(sa_column=_text())
    lease_until: float = Field(sa_column=_seconds())


class DecisionRow(Table, table=True):
    """A decision. The primary key is what makes it the only one of its assessment."""

    __tablename__ = "decision"
    application_id: str = Field(sa_column=_text(primary_key=True))
    assessment: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    fence: int = Field(sa_column=_count())
    payload: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    decided_at: float = Field(sa_column=_seconds())


class EvidenceRow(Table, table=True):
    """What a decision rested on, byte for byte, for explanation and replay."""

    __tablename__ = "evidence"
    application_id: str = Field(sa_column=_text(primary_key=True))
    assessment: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    profile: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    score: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    pricing: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


class EventRow(Table, table=True):
    """Something that happened. `seq` is the application's revision; `hash` chains it to the one before."""

    __tablename__ = "event"
    application_id: str = Field(sa_column=_text(primary_key=True))
    seq: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    kind: str = Field(sa_column=_text())
    at: float = Field(sa_column=_seconds())
    actor: str = Field(sa_column=_text())
    details: str = Field(sa_column=_text())
    hash: str = Field(sa_column=_text())


class RequestRow(Table, table=True):
    """A change a caller asked for, so that asking twice changes nothing."""

    __tablename__ = "request"
    application_id: str = Field(sa_column=_text(primary_key=True))
    request_id: str = Field(sa_column=_text(primary_key=True))
    said: str = Field(sa_column=_text())
