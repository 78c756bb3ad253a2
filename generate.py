"""Shim until the merge."""
from sampling import SamplingParams  # noqa
def generate_tokens(model, *args, **kwargs):
    return model.generate(*args, **kwargs)
