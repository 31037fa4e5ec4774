"""At how many attempts an application broke a stage, and an index of those parked for it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add them."""
    op.add_column("application", sa.Column("faults", sa.BigInteger, nullable=False, server_default="0"))
    parked = sa.text("state = 'PARKED'")
    op.create_index(
        "application_parked", "application", ["updated_at", "id"], sqlite_where=parked, postgresql_where=parked
    )


def downgrade() -> None:
    """Take them away. What is parked is pending again: the release before knows no other word for it."""
    op.execute("UPDATE application SET state = 'PENDING', due_at = NULL, waiting_for = '[]' WHERE state = 'PARKED'")
    op.drop_index("application_parked", "application")
    op.drop_column("application", "faults")
