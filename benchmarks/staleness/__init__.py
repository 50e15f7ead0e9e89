"""Every objective under stale data: ``python -m benchmarks.staleness`` (see report.py)."""
