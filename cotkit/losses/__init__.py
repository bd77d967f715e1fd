"""Tensors in, scalar out: `sft` makes given tokens likelier, `preference` ranks candidates."""
