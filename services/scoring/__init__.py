"""Scoring: profiles in; risk, grade and reasons out."""
