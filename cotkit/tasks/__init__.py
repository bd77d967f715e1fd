"""Synthetic tasks: ``(rng, **difficulty) -> row`` with an exact chain of thought, so that claims can show."""
