"""Measurements: the same work on this runtime and, side by side, on other systems. `python -m bench --help`."""
