"""A demonstration on real parts: a real model, served by vLLM, learns from simulated people."""
