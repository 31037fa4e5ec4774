"""Pricing: scored profiles in; a decision and offers under policy out."""
