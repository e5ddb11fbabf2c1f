"""Training: the compiled step, the loop of a run, and the ways in which a run stops."""
