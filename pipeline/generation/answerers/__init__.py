"""The answerers, one in each file; generate.engine selects one by name (registry.py)."""
