"""Rows in, fewer, repeated or ordered rows out; and how a number changes over a run."""

from cotkit.select import curriculum, quality

__all__ = ["curriculum", "quality"]
