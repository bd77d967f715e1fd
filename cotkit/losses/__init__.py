"""Tensors in, scalar out: `sft` makes given tokens likelier, `preference` ranks candidates."""

from cotkit.losses import distill, flow, preference, regularize, sft

__all__ = ["distill", "flow", "preference", "regularize", "sft"]
