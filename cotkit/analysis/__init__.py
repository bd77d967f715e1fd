"""A model or its traces in, numbers out: `dynamics` of a step, `faithful` what a chain hangs on, `forgetting`."""

from cotkit.analysis import dynamics, faithful, forgetting, forgetting

__all__ = ["dynamics", "faithful", "forgetting"]
