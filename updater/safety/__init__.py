"""The safety gate: no release goes live without its verdict on exactly those bytes."""

from updater.safety.gate import Gate
from updater.safety.probes import ProbeSet, ProbesInvalid, load_probes

__all__ = ["ProbesInvalid", "ProbeSet", "Gate", "load_probes"]
