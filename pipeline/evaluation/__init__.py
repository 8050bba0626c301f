"""Measures how much faster decoding with an exit head is, tests that it is lossless, and writes the report."""
