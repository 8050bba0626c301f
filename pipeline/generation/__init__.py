"""The backbone answers prompts: answerers, the responses they make, and how to look at those."""
