"""A model or its traces in, numbers out: `faithful` asks what a chain of thought really hangs on."""

from cotkit.analysis import faithful

__all__ = ["faithful"]
