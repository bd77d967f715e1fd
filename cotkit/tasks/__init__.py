"""Synthetic tasks: ``(rng, **difficulty) -> row`` with an exact chain of thought, made so that a claim can show."""
