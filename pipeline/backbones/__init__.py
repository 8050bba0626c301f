"""The frozen backbone: its config, tokenizer, weights and fingerprint."""
