"""The process that learns: feedback in, gated and divergence-bounded releases out."""
