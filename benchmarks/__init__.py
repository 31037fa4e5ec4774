"""Where the figures in the README come from: `make bench`. What each section measures: docs/benchmarks.md."""

import os

# We fork only to exec, so gRPC's fork handlers have nothing to save; without this each start prints a warning.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
