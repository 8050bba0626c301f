"""exit-heads: train, prove and publish early-exit draft heads for causal language models of transformers
(inference/families.py says which).

The stages meet in a run folder and nowhere else; docs/architecture.md is the map.
"""
