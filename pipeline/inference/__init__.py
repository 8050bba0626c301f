"""Everything needed to decode with an exit head. It needs only torch, transformers and safetensors.

Its modules import nothing else of this package: they are published byte for byte in `custom_generate/` of every head,
so that users run the code that was evaluated.
"""
