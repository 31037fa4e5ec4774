"""The first table: source_answer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create it."""
    op.create_table(
        "source_answer",
        *(sa.Column(name, sa.Text, nullable=False) for name in ("lender", "subject_hash", "source", "answer")),
        sa.Column("fetched_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("lender", "subject_hash", "source"),
    )


def downgrade() -> None:
    """Drop it."""
    op.drop_table("source_answer")
