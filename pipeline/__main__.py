"""Lets `python -m pipeline` be the same as `exit-heads`."""

from .cli import process

process()
