"""Generates responses: the answerers, the responses folder, its inspection, and documents to train on."""
