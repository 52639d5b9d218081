"""Adaptation methods, one file each: paper, module, config, placement."""
