"""Prompt sets: where they come from, which stage may see which, and their token ids.

Each prompt belongs to distill or to evaluate, never to both. docs/prompts.md says what can be read.
"""
