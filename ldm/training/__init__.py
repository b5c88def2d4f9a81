"""Training: one loop, and one module per stage."""
