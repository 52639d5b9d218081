"""Measuring time and memory of adapted models against a named peer, and tables of the results."""
