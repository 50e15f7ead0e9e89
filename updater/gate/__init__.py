"""The safety gate: no release goes live without its verdict on exactly those bytes."""

from updater.gate.canaries import CanaryError, CanarySet, load_canaries
from updater.gate.gate import Gate

__all__ = ["CanaryError", "CanarySet", "Gate", "load_canaries"]
