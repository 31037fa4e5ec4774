"""A whole mesh in one thread: the real code on a virtual clock, with all that can fail in the hands of a seed."""
