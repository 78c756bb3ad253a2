"""Import of models that other programs trained: one module for each, behind import_model.py."""
