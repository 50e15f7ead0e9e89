"""Stale data and a real model: ``python -m benchmarks.real`` (see report.py)."""
