"""Export of a model to the formats of other programs: one module for each, behind export.py."""
