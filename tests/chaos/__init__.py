"""`make chaos`: the real processes under load and faults, then a comparison with a run without."""
