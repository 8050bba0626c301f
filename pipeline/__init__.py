"""exit-heads: train, prove and publish early-exit draft heads for causal language models of the families Llama,
Mistral, Qwen2 and Qwen3 (inference/families.py says what is supported of each).


The stages meet in a run folder and nowhere else; docs/architecture.md is the map.
"""
