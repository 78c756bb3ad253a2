"""Leaves: each may be imported from anywhere, and imports nothing of the project but types."""
