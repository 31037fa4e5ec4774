"""Data keys, keyed look-ups, erasure: what was stored before stays readable, and is sealed by a pass over the table."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add them; all may be empty, so that replicas of the release before can still write."""
    for name, kind in (("key_id", sa.Text), ("data_key", sa.LargeBinary), ("look_up_id", sa.Text)):
        op.add_column("application", sa.Column(name, kind))
    op.add_column("application", sa.Column("erased_at", sa.Double))
    kept, erased = sa.text("erased_at IS NULL AND state <> 'PENDING'"), sa.text("erased_at IS NOT NULL")
    op.create_index(
        "application_kept", "application", ["state", "updated_at"], sqlite_where=kept, postgresql_where=kept
    )
    op.create_index("application_erased", "application", ["erased_at"], sqlite_where=erased, postgresql_where=erased)
    op.create_table(
        "subject",
        *(sa.Column(name, sa.Text, nullable=False) for name in ("lender", "subject_hash", "application_id")),
        sa.PrimaryKeyConstraint("lender", "subject_hash", "application_id"),
    )
    op.create_table(
        "chore",
        *(sa.Column(name, sa.Text, nullable=False) for name in ("name", "place", "told", "owner")),
        sa.Column("lease_until", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )


def downgrade() -> None:
    """Take them away. Only where nothing is sealed: what is sealed is lost with its data keys."""
    op.drop_table("chore")
    op.drop_table("subject")
    op.drop_index("application_erased", "application")
    op.drop_index("application_kept", "application")
    for name in ("erased_at", "look_up_id", "data_key", "key_id"):
        op.drop_column("application", name)
