"""Training: a run built from its arguments, its loop, and listeners that are told what happens."""
