"""A row in, a changed row out."""

from cotkit.rewrite import augment, pairs, structure

__all__ = ["augment", "pairs", "structure"]
