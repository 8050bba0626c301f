"""How much faster, and is it lossless? Measuring, proofs, figures and the report."""
