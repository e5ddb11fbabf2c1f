"""The programs: register, apply, train, eval, prepare."""
