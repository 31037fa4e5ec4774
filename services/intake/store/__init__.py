"""Intake's store: the only package here that knows SQL. Each change is one script, one transaction, on either database.

Two numbers keep it safe. `fence` counts claims: who lost a lease holds an old one and changes nothing. `revision`
counts events: any change that somebody else made first makes ours fail.
"""

from __future__ import annotations

from services.intake.store.accepting import Accepting
from services.intake.store.changing import Changing
from services.intake.store.counting import Counting
from services.intake.store.leasing import Leasing
from services.intake.store.listing import Listing


class Store(Accepting, Leasing, Changing, Listing, Counting):
    """Applications, decisions, evidence and events, on disk when a method returns. All raise DependencyDown."""
