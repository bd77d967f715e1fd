"""A model or its traces in, numbers out: `dynamics` of a training step, `faithful` what a chain hangs on."""

from cotkit.analysis import dynamics, faithful

__all__ = ["dynamics", "faithful"]
