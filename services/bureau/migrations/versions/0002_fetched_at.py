"""An index to purge by: source_answer.fetched_at."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create it."""
    op.create_index("ix_source_answer_fetched_at", "source_answer", ["fetched_at"])


def downgrade() -> None:
    """Drop it."""
    op.drop_index("ix_source_answer_fetched_at", "source_answer")
