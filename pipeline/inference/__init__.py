"""Everything needed to decode with an exit head: torch and transformers only, imports only its siblings.

These files are published byte for byte in `custom_generate/` of every head, so users run the code that was
evaluated. They know nothing of run folders, configs or training.
"""
