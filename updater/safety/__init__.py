"""The safety gate: no release goes live without its verdict on exactly those bytes."""

from updater.safety.gate import Gate
from updater.safety.probes import CanaryError, CanarySet, load_canaries

__all__ = ["CanaryError", "CanarySet", "Gate", "load_canaries"]
