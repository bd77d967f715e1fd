"""A model or its traces in, numbers out: `dynamics` of a step, `faithful` chains, `forgetting` and change."""

from cotkit.analysis import dynamics, faithful, forgetting

__all__ = ["dynamics", "faithful", "forgetting"]
