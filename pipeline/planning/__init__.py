"""Estimates what a run will need and whether a head will pay, by formulas, before any GPU is reserved.

The files take a config and the dimensions of an architecture; they give bytes, seconds and predicted speedups, each
with the terms that it is made of. Nothing is measured, and no weights are read. docs/planning.md derives the formulas.

Letters, as in docs/planning.md: L layers, D hidden size, F width of the MLP, Q = heads x head_dim, G = key/value heads
x head_dim, V vocabulary, P parameters of a layer, H exit heads, N an exit layer, K drafts of a round, S processes that
share one copy of the backbone, T tokens of a sequence, n tokens of a pass of one process, w bytes of a weight.
"""
