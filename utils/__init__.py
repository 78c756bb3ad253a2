"""Leaves: any module may import them; of the flat modules they import `parameters` alone."""
