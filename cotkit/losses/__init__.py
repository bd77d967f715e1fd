"""Tensors in, scalar out: `sft` makes given tokens likelier, `preference` ranks candidates."""

from cotkit.losses import advantage, distill, flow, policy, preference, regularize, sft

__all__ = ["advantage", "distill", "flow", "policy", "preference", "regularize", "sft"]
