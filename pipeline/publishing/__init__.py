"""A measured head becomes a folder that others load: gate, parity, files, cards, Hub."""
