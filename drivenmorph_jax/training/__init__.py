"""Training: the step, the loop, and how a run is stopped and resumed."""
