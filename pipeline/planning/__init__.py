"""What a run will need and whether it will pay, by formulas, before any GPU is asked for (docs/planning.md).

Takes a config and the numbers of an architecture, gives bytes, seconds and predicted speedups with how each came about.
Reads no weights, asks no network, measures nothing; knows nothing of torch.

Letters, as in docs/planning.md: L layers, D hidden size, F width of the MLP, Q = heads x head_dim, G = heads of keys x
head_dim, V vocabulary, P parameters of a layer, H exit heads, N an exit layer, K drafts of a round, S processes that
share one copy of the backbone, T tokens of a sequence, n tokens of a pass of one process, w bytes of a weight.
"""
