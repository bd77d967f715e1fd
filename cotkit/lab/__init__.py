"""The notebook bench: a tiny model that is really trained, a small loop, and honest tables.

Functions, in the order of a notebook: ``setup`` seeds and silence; ``load`` model and tokenizer; ``rows``
data; ``fit`` training; ``sample``, ``generator`` writing; ``rollout`` an on-policy batch, sampled and scored;
``evaluate`` the metric loop; ``score`` how likely a chain is; ``show_segments``, ``microscope``, ``plot``,
``plot_arms``, ``plot_scores`` to look; ``save_table`` and ``table`` for sweeps; ``claim`` judging, ``holm``
over many claims, ``false_verdicts`` of the test itself.
"""

from cotkit.lab._claim import Claim, claim, false_verdicts, holm
from cotkit.lab._data import has_data, rows
from cotkit.lab._generate import evaluate, generator, sample, score
from cotkit.lab._model import load
from cotkit.lab._rollout import rollout
from cotkit.lab._setup import setup
from cotkit.lab._show import microscope, plot, plot_arms, plot_scores, show_segments
from cotkit.lab._table import Table, save_table, table
from cotkit.lab._train import fit

__all__ = [  # noqa: RUF022  in reading order
    "setup",
    "load",
    "rows",
    "has_data",
    "fit",
    "sample",
    "generator",
    "rollout",
    "evaluate",
    "score",
    "show_segments",
    "microscope",
    "plot",
    "plot_arms",
    "plot_scores",
    "claim",
    "Claim",
    "holm",
    "false_verdicts",
    "save_table",
    "Table",
    "table",
]
