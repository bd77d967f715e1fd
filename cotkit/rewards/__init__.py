"""Completions in, one number each out: every function here makes a reward that TRL can call as it is."""

from cotkit.rewards import answer, combine, format, grounding, judge, length, steps

__all__ = ["answer", "combine", "format", "grounding", "judge", "length", "steps"]
