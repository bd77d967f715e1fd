"""A model in, a trainable model or a part of one out."""

from cotkit.adapters import experts, freeze, lora, modules, sparse

__all__ = ["experts", "freeze", "lora", "modules", "sparse"]
