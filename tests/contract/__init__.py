"""The contract: what every method promises on every family of models, and the declared exceptions."""
