"""Rows in, fewer, repeated or ordered rows out; and how a number changes over a run."""

from cotkit.select import curriculum, difficulty, quality, rehearsal

__all__ = ["curriculum", "difficulty", "quality", "rehearsal"]
