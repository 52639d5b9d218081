"""Measuring: time and memory against a named peer, grids of runs against published numbers, and their tables."""
