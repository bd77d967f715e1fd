"""A row in, a changed row out."""

from cotkit.rewrite import pairs, structure

__all__ = ["pairs", "structure"]
