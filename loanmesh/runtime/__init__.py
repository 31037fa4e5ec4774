"""What every service stands on: clock, errors, settings, server, channels, telemetry, database."""
