"""Completions in, one number each out: every function here makes a reward that TRL can call as it is."""

from cotkit.rewards import answer, format, steps

__all__ = ["answer", "format", "steps"]
