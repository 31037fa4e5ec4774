"""The trace an application came with, its payload as first submitted, what a change said, an index by age."""

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
    op.add_column("application", sa.Column("original", sa.LargeBinary))
    pending = sa.text("state = 'PENDING'")
    op.create_index("application_aged", "application", ["not_before"], sqlite_where=pending, postgresql_where=pending)
    # Before the first release: what was kept so far cannot be told from its hash.
    op.execute("DELETE FROM request")
    op.execute("ALTER TABLE request RENAME COLUMN payload_hash TO said")


def downgrade() -> None:
    """Take them away."""
    op.execute("DELETE FROM request")
    op.execute("ALTER TABLE request RENAME COLUMN said TO payload_hash")
    op.drop_index("application_aged", "application")
    op.drop_column("application", "original")
    op.drop_column("application", "traceparent")
