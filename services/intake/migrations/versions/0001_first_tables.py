"""The first tables: application, decision, evidence, event, request."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create them."""
    op.create_table(
        "application",
        *(sa.Column(name, sa.Text, nullable=False) for name in ("id", "lender", "client_id", "request_id")),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("payload_hash", sa.Text, nullable=False),
        sa.Column("priority", sa.BigInteger, nullable=False),
        sa.Column("channel", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text),
        sa.Column("grade", sa.Text),
        sa.Column("owner", sa.Text),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("lease_until", sa.Double),
        sa.Column("attempts", sa.BigInteger, nullable=False),
        sa.Column("not_before", sa.Double, nullable=False),
        sa.Column("waiting_for", sa.Text, nullable=False),
        sa.Column("missing", sa.Text, nullable=False),
        sa.Column("due_at", sa.Double),
        sa.Column("assessment", sa.BigInteger, nullable=False),
        sa.Column("accepted_offer", sa.Text, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("event_hash", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("lender", "client_id", "request_id", name="application_request"),
    )
    pending = sa.text("state = 'PENDING'")
    due = sa.text("due_at IS NOT NULL")
    op.create_index(
        "application_open", "application", ["priority", "not_before"], sqlite_where=pending, postgresql_where=pending
    )
    op.create_index("application_listed", "application", ["lender", "created_at", "id"])
    op.create_index("application_due", "application", ["due_at"], sqlite_where=due, postgresql_where=due)
    op.create_table(
        "decision",
        sa.Column("application_id", sa.Text, nullable=False),
        sa.Column("assessment", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("decided_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("application_id", "assessment"),
    )
    op.create_table(
        "evidence",
        sa.Column("application_id", sa.Text, nullable=False),
        sa.Column("assessment", sa.BigInteger, nullable=False, autoincrement=False),
        *(sa.Column(name, sa.LargeBinary, nullable=False) for name in ("profile", "score", "pricing")),
        sa.PrimaryKeyConstraint("application_id", "assessment"),
    )
    op.create_table(
        "event",
        sa.Column("application_id", sa.Text, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("actor", "details", "hash")),
        sa.PrimaryKeyConstraint("application_id", "seq"),
    )
    op.create_table(
        "request",
        *(sa.Column(name, sa.Text, nullable=False) for name in ("application_id", "request_id", "payload_hash")),
        sa.PrimaryKeyConstraint("application_id", "request_id"),
    )


def downgrade() -> None:
    """Drop them."""
    for table in ("request", "event", "evidence", "decision", "application"):
        op.drop_table(table)
