"""The built-in tiny backbone: a deep and thin Llama trained on the Python standard library.

A real transformers checkpoint and two prompt files, so that the whole pipeline runs on a laptop without a network.
How the weights were made: `python -m pipeline.pocket --help`.
"""
