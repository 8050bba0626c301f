"""Prompt sets: their sources, the split between stages, and their token ids.

Each prompt belongs to distill or to evaluate, never to both. docs/prompts.md lists the formats that can be read.
"""
