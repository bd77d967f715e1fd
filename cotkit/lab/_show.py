"""Looking: tokens in the colour of their segment, the push of a loss on every token, and four plots.

Conventions: what is shown carries its numbers in ``table`` (a DataFrame). Colours are told apart by
colour-blind readers, half transparent so that they work on light and dark pages, and never the only sign.
Functions: ``show_segments`` what each token is; ``microscope`` where a loss pushes; ``plot`` curves with
seeds, ``plot_arms`` points with intervals, ``plot_scores`` right and wrong chains' scores.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cotkit._check import one_of
from cotkit.lab._interval import quantile
from cotkit.lab._setup import COLOURS, GREY
from cotkit.tokens import Format, encode, model_logps

__all__ = ["Shown", "microscope", "plot", "plot_arms", "plot_scores", "show_segments"]

_NAMES = ("pad", "prompt", "thought", "answer", "special", "tool")
_TINTS = (
    "transparent",
    "rgba(128,128,128,.16)",
    "rgba(0,114,178,.30)",
    "rgba(230,159,0,.50)",
    "rgba(204,121,167,.35)",
    "rgba(0,158,115,.35)",
)
_UP, _DOWN = "0,114,178", "213,94,0"  # blue up, orange down
_BOX = "white-space:pre-wrap;font-family:monospace;line-height:1.7"


class Shown(NamedTuple):
    """Something to look at in a notebook: ``html`` and the numbers behind it, ``table`` (DataFrame)."""

    html: str
    table: Any

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        """Say what is inside, in one line."""
        return f"<{len(self.table)} lines: {', '.join(map(str, self.table.columns))}>"


def show_segments(row: Mapping[str, Any], tokenizer: Any, fmt: Format | str = "think") -> Shown:
    r"""Draw every token of a row in the colour of its segment, one line per segment and step.

    Args:
        row: prompt-completion row; a completion that does not follow ``fmt`` is shown as it is encoded.
        tokenizer: a fast tokenizer.
        fmt: how a thought and its answer are written.

    Returns:
        A table of segments in reading order, each with its tokens; neighbours differ in strength, so that
        token borders show. Its ``table`` has a line per token: position, token, id, segment, step, target
        (whether it has a label).

    Raises:
        TypeError: ``row`` is not one row.

    Source: none (plumbing)
    Basis: none needed.
    Differs: nothing.

    Example:
        >>> from cotkit import lab
        >>> _, tokenizer = lab.load("tiny")
        >>> row = {"prompt": "2+3?", "completion": "<think>\n2+3=5\n</think>\n5"}
        >>> shown = show_segments(row, tokenizer)
        >>> "".join(shown.table.token[shown.table.segment == "thought"])
        '2+3=5'
    """
    import pandas as pd

    if not isinstance(row, Mapping):
        raise TypeError(f"show_segments: expected one row (a dict), got {type(row).__name__}. Pass rows[0].")
    batch = encode([row], tokenizer, fmt, malformed="keep")
    table = pd.DataFrame(_tokens(batch, 0, tokenizer))
    lines: list[tuple[str, str, list[str]]] = []
    last = None
    for token in table.itertuples():
        name = token.segment + (f" {token.step + 1}" if token.step >= 0 else "")
        if name != last:
            lines.append((name, token.segment, []))
            last = name
        tint = _TINTS[_NAMES.index(token.segment)]
        border = ";border-left:1px solid rgba(128,128,128,.6)" if lines[-1][2] else ""
        title = f"{token.token!r} id {token.id}"
        lines[-1][2].append(_span(token.token, f"background:{tint}{border}", title))
    body = "".join(
        f'<tr><th style="text-align:left;background:{_TINTS[_NAMES.index(segment)]}">{escape(name)}</th>'
        f'<td style="text-align:left;{_BOX}">{"".join(spans)}</td></tr>'
        for name, segment, spans in lines
    )
    odd = bool(batch["malformed"][0])
    note = "<p>This completion does not follow the format: all of it counts as thought.</p>" if odd else ""
    return Shown(f'<table class="tex2jax_ignore mathjax_ignore">{body}</table>{note}', table)


def microscope(
    losses: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]],
    model: Any,
    tokenizer: Any,
    rows: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    fmt: Format | str = "think",
    columns: Sequence[str] = (),
    prepare: Callable[[dict[str, Tensor], int], dict[str, Tensor]] | None = None,
) -> Shown:
    r"""Colour every token by the push a loss gives it: blue = made likelier, orange = made less likely.

    $push_t = -\partial L / \partial \log p_t$: what a small step of gradient descent does to the token's
    log-probability if each could move alone. Each loss has its own scale; its largest push is written beside
    it.

    Args:
        losses: one ``loss(logps [B, T], batch, denom)``, or several by name. ``denom`` is None.
        model: a causal language model.
        tokenizer: its tokenizer.
        rows: one row, or all rows of a group.
        fmt: how a thought and its answer are written; rows that do not follow it are kept.
        columns: numbers of the rows that the losses read from ``batch``, e.g. ``("group", "rank", "gold")``.
        prepare: changes the encoded batch before the forward pass, as in ``fit`` (its step is 0): what masked
            thought reads, say. The tokens shown stay the labels.

    Returns:
        Per row a table with one line per loss. ``table`` has a line per loss, row and token with a label:
        loss, row, position, token, segment, step, logp (nats), push.

    Raises:
        ValueError: no losses or rows, a missing column.

    Source: none (plumbing)
    Basis: none needed.
    Differs: nothing.

    Example:
        >>> from cotkit import lab
        >>> from cotkit.losses.sft import nll
        >>> model, tokenizer = lab.load("tiny")
        >>> row = {"prompt": "2+3?", "completion": "<think>\n2+3=5\n</think>\n5"}
        >>> seen = microscope(lambda logps, batch, denom: nll(logps, batch["mask"]), model, tokenizer, row)
        >>> bool((seen.table.push > 0).all())  # SFT pushes every token up
        True
    """
    import pandas as pd

    named = dict(losses) if isinstance(losses, Mapping) else {getattr(losses, "__name__", "loss"): losses}
    chosen = [rows] if isinstance(rows, Mapping) else list(rows)
    if not named or not chosen:
        raise ValueError(
            f"microscope: expected losses and rows, got {len(named)} losses, {len(chosen)} rows."
        )
    batch = encode(chosen, tokenizer, fmt, malformed="keep")
    batch["mask"] = batch["labels"] != -100
    for name in columns:
        if any(name not in row for row in chosen):
            raise ValueError(f"microscope: expected column {name!r} in every row, got none in some.")
        batch[name] = torch.tensor([row[name] for row in chosen])
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    shown = batch
    batch = {name: value.to(device) for name, value in batch.items()}
    if prepare is not None:
        batch = {name: value.to(device) for name, value in prepare(batch, 0).items()}
    logps = model_logps(model, batch).detach().float()
    model.train(training)
    records = []
    for name, loss in named.items():
        leaf = logps.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf, batch, None), leaf, allow_unused=True)
        push = torch.zeros_like(leaf) if slope is None else -slope
        for i in range(len(chosen)):
            for token in _tokens(shown, i, tokenizer):
                if token.pop("target"):
                    at = token["position"]
                    token |= {"logp": float(logps[i, at]), "push": float(push[i, at])}
                    records.append({"loss": name, "row": i, **token})
    table = pd.DataFrame(records)
    html = "".join(_seen(table[table.row == i], i, len(chosen)) for i in range(len(chosen)))
    legend = f"<p>{_span(' made likelier ', f'background:rgba({_UP},.6)')} "
    legend += f"{_span(' made less likely ', f'background:rgba({_DOWN},.6)')} by one step of descent</p>"
    return Shown(legend + html, table)


def _seen(table: Any, row: int, rows: int) -> str:
    lines = []
    for name, part in table.groupby("loss", sort=False):
        largest = float(part.push.abs().max())
        spans = [
            _span(
                token.token,
                f"background:rgba({_UP if token.push > 0 else _DOWN},{_strength(token.push, largest):.2f})",
                f"{token.segment} logp {token.logp:.3f} push {token.push:+.4g}",
            )
            for token in part.itertuples()
        ]
        lines.append(
            f'<tr><th style="text-align:left">{escape(str(name))}<br>'
            f"<small>largest push {largest:.2g}</small></th>"
            f'<td style="text-align:left;{_BOX}">{"".join(spans)}</td></tr>'
        )
    head = f"<tr><td></td><th>row {row}</th></tr>" if rows > 1 else ""
    return f'<table class="tex2jax_ignore mathjax_ignore">{head}{"".join(lines)}</table>'


def _strength(push: float, largest: float) -> float:
    return 0.0 if largest == 0 or push == 0 else 0.08 + 0.72 * abs(push) / largest


def _tokens(batch: Mapping[str, Tensor], i: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Position, text, id, segment, step and target of every token of row i that is not padding."""
    segments, steps = batch["segments"][i].tolist(), batch["steps"][i].tolist()
    ids, labels = batch["input_ids"][i].tolist(), batch["labels"][i].tolist()
    return [
        {
            "position": t,
            "token": tokenizer.decode([ids[t]], clean_up_tokenization_spaces=False),
            "id": ids[t],
            "segment": _NAMES[segments[t]],
            "step": steps[t],
            "target": labels[t] != -100,
        }
        for t in range(len(ids))
        if segments[t] != 0
    ]


def _span(text: str, style: str, title: str = "") -> str:
    """One token; a newline is drawn as an arrow, so that every token can be seen."""
    seen = escape(text).replace("\n", "↵")
    return f'<span style="{style};padding:0 1px" title="{escape(title, quote=True)}">{seen}</span>'


def plot(
    arms: Mapping[str, Any],
    *,
    x: str,
    y: str,
    title: str,
    at: Sequence[float] | None = None,
    baseline: str | None = None,
    ax: Any = None,
) -> Any:
    """Draw curves: the mean over seeds as a thick line, each seed as a thin one, the baseline in grey.

    Args:
        arms: arm -> values [S, P] (seeds, points) or [P].
        x: label of the x axis, with its unit.
        y: label of the y axis, with its unit.
        title: the finding, as a sentence.
        at: positions of the points on the x axis; None: 0, 1, 2, ...
        baseline: the arm drawn in grey; None: the first.
        ax: axes to draw on; None: a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: no arms, an empty label or title, or shapes that do not fit.

    Source: none (plumbing)
    Basis: none needed.
    Differs: nothing.

    Example:
        >>> ax = plot({"SFT": [[1.0, 0.5], [0.9, 0.6]]}, x="step", y="loss (nats)", title="SFT learns")
        >>> ax.lines[-1].get_ydata().tolist()
        [0.95, 0.55]
    """
    import numpy as np

    ax, colours = _canvas("plot", arms, {"x": x, "y": y, "title": title}, baseline, ax)
    for name, values in arms.items():
        lines = np.atleast_2d(np.asarray(values, dtype=float))
        where = np.arange(lines.shape[1]) if at is None else np.asarray(at, dtype=float)
        if lines.ndim != 2 or len(where) != lines.shape[1]:
            raise ValueError(
                f"plot: expected {name!r} as [seeds, {len(where)} points], got {list(np.shape(values))}."
            )
        for line in lines if len(lines) > 1 else []:
            ax.plot(where, line, color=colours[name], alpha=0.35, linewidth=0.8)
        ax.plot(where, lines.mean(0), color=colours[name], linewidth=2, label=name)
    ax.set(xlabel=x, ylabel=y)
    ax.set_title(title)
    if len(arms) > 1:
        ax.legend()
    return ax


def plot_arms(
    arms: Mapping[str, Any], *, y: str, title: str, baseline: str | None = None, ax: Any = None
) -> Any:
    """Draw one column per arm: every seed a point, the mean with its 95 % t interval, the baseline in grey.

    Args:
        arms: arm -> one number per seed, or [N, S] for N base checkpoints (marked by different shapes).
        y: label of the y axis, with its unit.
        title: the finding, as a sentence.
        baseline: the arm drawn in grey, its mean drawn through; None: the first.
        ax: axes to draw on; None: a new figure.

    Returns:
        The axes. Intervals are of each arm alone; ``claim`` has those of paired differences, which are
        narrower.

    Raises:
        ValueError: no arms, an empty label or title, or an arm without numbers.

    Source: none (plumbing)
    Basis: none needed.
    Differs: nothing.

    Example:
        >>> ax = plot_arms({"SFT": [0.6, 0.7], "AFT": [0.7, 0.8]}, y="accuracy (fraction)", title="AFT helps")
        >>> [t.get_text() for t in ax.get_xticklabels()]
        ['SFT', 'AFT']
    """
    import numpy as np

    ax, colours = _canvas("plot_arms", arms, {"y": y, "title": title}, baseline, ax)
    grey = next(name for name, colour in colours.items() if colour == GREY)
    for k, (name, values) in enumerate(arms.items()):
        table = np.atleast_2d(np.asarray(values, dtype=float))
        if table.ndim != 2 or table.size == 0 or np.isnan(table).all():
            raise ValueError(f"plot_arms: expected numbers for {name!r}, got {list(np.shape(values))}.")
        for b, line in enumerate(table):
            aside = np.linspace(-0.16, 0.16, len(line)) if len(line) > 1 else np.zeros(1)
            ax.scatter(
                k + aside, line, s=18, marker="osD^v"[b % 5], color=colours[name], alpha=0.6, linewidths=0
            )
        points = table.mean(0) if len(table) > 1 else table[0]
        points = points[~np.isnan(points)]
        half = 0.0
        if len(points) > 1:
            half = quantile(0.05, len(points) - 1.0) * float(points.std(ddof=1)) / math.sqrt(len(points))
        ax.errorbar(
            k + 0.28, points.mean(), yerr=half, fmt="_", color=colours[name], markersize=12, capsize=3
        )
        if name == grey:
            ax.axhline(points.mean(), color=GREY, linewidth=0.8, linestyle=":")
    ax.set_xticks(range(len(arms)), list(arms), rotation=20 if len(arms) > 4 else 0)
    ax.set_ylabel(y)
    ax.set_title(title)
    ax.grid(visible=False, axis="x")
    return ax


def plot_scores(
    panels: Mapping[str, tuple[Any, Any]],
    *,
    title: str,
    x: str = "mean log-probability (nats per token)",
    bins: int = 24,
) -> Any:
    """Draw the scores of right and wrong chains as two histograms, one panel per model, on one scale.

    Args:
        panels: name -> (scores [N], right [N] of truth values), e.g. before and after AFT.
        title: the finding, as a sentence.
        x: label of the x axis, with its unit.
        bins: number of bars over the range that all panels share.

    Returns:
        The axes, one per panel.

    Raises:
        ValueError: no panels, an empty title, or scores and truth values of different number.

    Source: none (plumbing)
    Basis: none needed.
    Differs: nothing.

    Example:
        >>> axes = plot_scores({"SFT": ([-0.2, -0.9], [True, False])}, title="Wrong chains score lower")
        >>> axes[0].get_title(loc="right")
        'SFT'
    """
    import matplotlib.pyplot as plt
    import numpy as np

    _labels("plot_scores", panels, {"title": title, "x": x})
    data = {}
    for name, (scores, right) in panels.items():
        s, r = np.asarray(scores, dtype=float), np.asarray(right).astype(bool)
        if s.shape != r.shape or s.ndim != 1:
            raise ValueError(
                f"plot_scores: expected scores, right [N] for {name!r}, got {list(s.shape)}, {list(r.shape)}."
            )
        data[name] = (s, r)
    everything = np.concatenate([s for s, _ in data.values()])
    edges = np.histogram_bin_edges(everything[np.isfinite(everything)], bins=bins)
    figure, axes = plt.subplots(
        1, len(data), sharex=True, sharey=True, squeeze=False, figsize=(1.2 + 3.2 * len(data), 2.9)
    )
    for ax, (name, (s, r)) in zip(axes[0], data.items(), strict=True):
        ax.hist(s[~r], edges, color=COLOURS[1], alpha=0.6, label=f"wrong ({int((~r).sum())})")
        ax.hist(
            s[r], edges, histtype="step", color=COLOURS[0], linewidth=1.8, label=f"right ({int(r.sum())})"
        )
        ax.set_title(name, loc="right")
        ax.set_xlabel(x)
        ax.legend(loc="upper left")
    axes[0][0].set_ylabel("chains (number)")
    figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=11)
    figure.tight_layout()
    return list(axes[0])


def _labels(fn: str, arms: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    if not arms:
        raise ValueError(f"{fn}: expected at least one arm, got none.")
    for name, text in texts.items():
        if not text.strip():
            raise ValueError(f"{fn}: expected {name} as text, got nothing. A title states the finding.")


def _canvas(
    fn: str, arms: Mapping[str, Any], texts: Mapping[str, str], baseline: str | None, ax: Any
) -> tuple[Any, dict[str, str]]:
    """Axes, and the colour of every arm: the baseline grey, the others in the order of the palette."""
    import matplotlib.pyplot as plt

    _labels(fn, arms, texts)
    baseline = next(iter(arms)) if baseline is None else baseline
    one_of(fn, list(arms), baseline=baseline)
    others = [name for name in arms if name != baseline]
    colours = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(others)} | {baseline: GREY}
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    return ax, colours
