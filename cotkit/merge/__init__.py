r"""Weights in, weights out: averages, task vectors, masks and layer scalings of models with one ancestor.

Conventions: a state is a mapping from names to tensors, ``model.state_dict()`` or ``checkpoint(path)``, which
reads one tensor at a time; theta_0 is the state all models were fine-tuned from, a delta is theta - theta_0.
Tensors of integers (counters, position ids) are copied from the first state. float16 and bfloat16 are merged
in float32 and rounded once. Nothing is changed in place, and every refusal names the tensor.

Functions: ``delta``, ``apply`` task vectors off and on; ``average`` uniform soup and disperse-then-merge,
``greedy_soup`` only what helps; ``cosines`` angles between deltas, ``stock_ratio`` and ``model_stock`` what
they say about the distance to the centre; ``breadcrumbs`` a two-sided mask; ``lines``, ``lines_alpha`` layers
scaled by depth; ``reset`` some tensors back; ``select_experts`` which models to merge at all.
Files: ``checkpoint`` reads safetensors, ``lazy`` merges a tensor when it is asked for, ``save`` writes. Every
merge above works on files: ``save(lazy(rule, *map(checkpoint, folders)), out, like=folders[0])``.

Recipes: disperse-then-merge fine-tunes the base on each of ``[rows[i::k] for i in range(k)]`` and calls
``average``; LiNeS of several tasks is ``lines(merged, r"layers\.(\d+)\.", n_blocks, alpha=a, beta=b)`` with
``a = lines_alpha(deltas, merged)``, put on with ``apply``; model stock during training replaces all models by
their ``model_stock`` after each epoch.
"""

from cotkit.merge._files import checkpoint, lazy, save
from cotkit.merge._masks import breadcrumbs
from cotkit.merge._soups import average, greedy_soup, select_experts
from cotkit.merge._stock import cosines, model_stock, stock_ratio
from cotkit.merge._vectors import apply, delta, lines, lines_alpha, reset

__all__ = [  # noqa: RUF022  in reading order
    "delta",
    "apply",
    "average",
    "greedy_soup",
    "cosines",
    "stock_ratio",
    "model_stock",
    "breadcrumbs",
    "lines",
    "lines_alpha",
    "reset",
    "select_experts",
    "checkpoint",
    "lazy",
    "save",
]
