"""Nonsense on purpose: requests, settings, policies and models that nobody sound would send or write."""
