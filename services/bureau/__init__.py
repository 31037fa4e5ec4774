"""Bureau: many sources gathered into one fresh profile, with provenance."""
