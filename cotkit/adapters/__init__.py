"""A model in, a trainable model or a part of one out."""

from cotkit.adapters import modules

__all__ = ["modules"]
