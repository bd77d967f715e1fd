"""Synthetic tasks: ``(rng, **difficulty) -> row`` with an exact chain of thought, so that claims can show."""

from cotkit.tasks import arithmetic

__all__ = ["arithmetic"]
