"""Exit heads as vLLM's drafter: README.md says how to use it, plugin.py is where vLLM comes in."""
