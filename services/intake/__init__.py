"""Intake: accepts applications durably and decides each exactly once."""
