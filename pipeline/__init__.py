"""exit-heads: train, prove and publish early-exit draft heads for frozen language models.

The stages meet in a run folder and nowhere else; docs/architecture.md is the map.
"""
