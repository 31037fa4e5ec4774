"""Promotions as data: what a day asks for, what one replica does, and what follows for replicas and connections."""
