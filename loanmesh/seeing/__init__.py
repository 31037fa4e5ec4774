"""What the mesh told of itself, kept and read: spans and logs, on a laptop or from Jaeger."""
