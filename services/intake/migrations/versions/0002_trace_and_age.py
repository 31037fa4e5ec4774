"""The trace an application came with, and an index for those whose turn it is by age."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add them."""
    op.add_column("application", sa.Column("traceparent", sa.Text, nullable=False, server_default=""))
    pending = sa.text("state = 'PENDING'")
    op.create_index("application_aged", "application", ["not_before"], sqlite_where=pending, postgresql_where=pending)


def downgrade() -> None:
    """Take them away."""
    op.drop_index("application_aged", "application")
    op.drop_column("application", "traceparent")
