"""A model that writes and a reward in, new rows out."""

from cotkit.bootstrap import reject

__all__ = ["reject"]
