"""What we try the mesh with; it knows the mesh from outside only."""
