"""Training on accelerate, with exact resume."""
