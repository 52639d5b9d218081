"""Data sets for classification: folders, tables, hub data sets and the small sets shipped with the package."""
