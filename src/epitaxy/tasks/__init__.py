"""Tasks: from examples to a batch, from a batch to a loss, from predictions to metrics."""
