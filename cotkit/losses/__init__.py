"""Tensors in, scalar out: `sft` makes given tokens likelier, `preference` ranks candidates."""

from cotkit.losses import preference, regularize, sft

__all__ = ["preference", "regularize", "sft"]
