"""The table bureau owns: what sources said, by subject hash; no identity numbers."""

from __future__ import annotations

from sqlalchemy import Column, Double, MetaData, Text
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
