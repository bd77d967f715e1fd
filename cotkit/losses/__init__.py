"""Tensors in, scalar out: `sft` makes given tokens likelier, `preference` ranks candidates."""

from cotkit.losses import distill, preference, regularize, sft

__all__ = ["distill", "preference", "regularize", "sft"]
