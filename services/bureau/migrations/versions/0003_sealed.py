"""Answers sealed, with the id of their key; what was stored before stays readable until it runs out."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add them; all may be empty, so that replicas of the release before can still write."""
    op.add_column("source_answer", sa.Column("sealed", sa.LargeBinary))
    op.add_column("source_answer", sa.Column("key_id", sa.Text))
    op.create_table(
        "erasure",
        *(sa.Column(name, sa.Text, nullable=False) for name in ("lender", "subject_hash")),
        sa.Column("erased_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("lender", "subject_hash"),
    )
    op.create_index("ix_erasure_erased_at", "erasure", ["erased_at"])


def downgrade() -> None:
    """Take them away; sealed answers go with them, which costs a query each."""
    op.drop_table("erasure")
    op.execute("DELETE FROM source_answer WHERE sealed IS NOT NULL")
    op.drop_column("source_answer", "key_id")
    op.drop_column("source_answer", "sealed")
