"""Turns a measured head into a folder that others can load, and pushes it to the Hub: gate, files, parity, cards."""
