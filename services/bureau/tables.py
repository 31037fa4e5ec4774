"""The tables bureau owns: what sources said, sealed, by subject hash; no identity numbers."""

from __future__ import annotations

from sqlalchemy import Column, Double, LargeBinary, MetaData, Text
from sqlmodel import Field, SQLModel

metadata = MetaData()


class Table(SQLModel):
    """Base with this service's own metadata."""

    metadata = metadata


class SourceAnswerRow(Table, table=True):
    """The newest answer of one source about one subject, for one lender."""

    __tablename__ = "source_answer"
    lender: str = Field(sa_column=Column(Text, primary_key=True))
    subject_hash: str = Field(sa_column=Column(Text, primary_key=True))
    source: str = Field(sa_column=Column(Text, primary_key=True))
    answer: str = Field(sa_column=Column(Text, nullable=False))
    fetched_at: float = Field(sa_column=Column(Double, nullable=False, index=True))
    sealed: bytes | None = Field(sa_column=Column(LargeBinary, nullable=True))
    key_id: str | None = Field(sa_column=Column(Text, nullable=True))


class ErasureRow(Table, table=True):
    """A subject whose answers were erased, for as long as other replicas may have them in memory."""

    __tablename__ = "erasure"
    lender: str = Field(sa_column=Column(Text, primary_key=True))
    subject_hash: str = Field(sa_column=Column(Text, primary_key=True))
    erased_at: float = Field(sa_column=Column(Double, nullable=False, index=True))
