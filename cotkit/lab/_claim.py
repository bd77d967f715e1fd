"""A claim of a paper, measured: effect, honest interval and verdict from the results of several runs.

Conventions: an effect is arm minus control in the metric's own unit (fractions in [0, 1]); a run is one seed
on one base checkpoint; results are kept per question, so that seeds, bases and questions all enter the
interval. Verdicts: supported, right direction, no difference, opposite, inconclusive, not testable here;
``stale`` and ``not run here`` say that there was nothing to judge.
Functions: ``claim`` judges one claim; ``holm`` corrects many p-values; ``false_verdicts`` measures the test
itself.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cotkit._check import between, finite, positive
from cotkit.lab import _interval
from cotkit.lab._table import Table, unpack

__all__ = ["Claim", "claim", "false_verdicts", "holm"]

ALPHA = 0.05
_FIELDS = {
    "paper", "sentence", "arm", "arms", "control", "metric", "greater", "smallest_effect", "within", "trend",
    "precondition", "reported", "best", "grid", "questions", "seeds", "bases", "notebook", "table", "date",
    "pinned", "authors", "where", "note", "one_seed",
}  # fmt: skip


class Claim(NamedTuple):
    """What ``claim`` found; shows itself as a table. Effects are arm minus control, in the metric's unit."""

    name: str
    paper: str
    sentence: str
    arm: str
    control: str
    metric: str
    form: str
    greater: bool
    verdict: str
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    df: float = math.nan
    p: float = math.nan
    p_smallest: float = math.nan
    smallest_effect: float = math.nan
    arm_mean: float = math.nan
    control_mean: float = math.nan
    error_removed: float = math.nan
    reported: float = math.nan
    reported_error_removed: float = math.nan
    reported_basis: str = ""
    runs: int = 0
    seeds: int = 0
    bases: int = 0
    questions: int = 0
    sign_share: float = math.nan
    grid_share: float = math.nan
    note: str = ""

    def cells(self) -> dict[str, str]:
        """The columns of the table as text, in reading order."""
        against = f"{self.control} {_number(self.control_mean)}" if self.control else ""
        span = f"{_signed(self.effect)} [{_signed(self.low)}, {_signed(self.high)}]"
        signs = "" if math.isnan(self.sign_share) else f"in {self.sign_share:.0%} of runs"
        signs += "" if math.isnan(self.grid_share) else f", {self.grid_share:.0%} of settings"
        crossed = self.runs == self.seeds * self.bases
        counts = (
            f"{self.seeds} seeds x {self.bases} bases"
            if crossed
            else f"{self.runs} runs on {self.bases} bases"
        )
        counts += f" x {self.questions} questions"
        cells = {
            "claim": f"{self.paper}: {self.sentence}",
            "arm": f"{self.arm} {_number(self.arm_mean)}",
            "control": against,
            "effect [95 %]": span if self.runs else "",
            "matters from": _number(self.smallest_effect),
            "error removed": "" if math.isnan(self.error_removed) else f"{self.error_removed:.0%}",
            "paper": "" if math.isnan(self.reported) else f"{_signed(self.reported)} ({self.reported_basis})",
            "runs": counts if self.runs else "none",
            "sign holds": signs,
            "verdict": self.verdict,
        }
        if not math.isnan(self.reported_error_removed):
            cells["paper"] += f", error removed {self.reported_error_removed:.0%}"
        if self.note:
            cells["note"] = self.note
        return {name: text for name, text in cells.items() if text}

    def _repr_markdown_(self) -> str:
        cells = self.cells()
        rows = [" | ".join(cells), " | ".join("---" for _ in cells), " | ".join(cells.values())]
        return "\n".join(f"| {row} |" for row in rows)

    def _repr_html_(self) -> str:
        from html import escape

        cells = self.cells()
        colour = {"supported": "#0072B2", "right direction": "#56B4E9", "opposite": "#D55E00"}
        mark = next((c for v, c in colour.items() if self.verdict.startswith(v)), "#8a8a8a")
        body = "".join(
            f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">'
            + (f'<b style="border-left:0.5em solid {mark};padding-left:0.4em">' if name == "verdict" else "")
            + escape(text)
            + ("</b>" if name == "verdict" else "")
            + "</td></tr>"
            for name, text in cells.items()
        )
        return f"<table>{body}</table>"

    def __str__(self) -> str:
        """One line: name, effect, interval, verdict."""
        span = f"{_signed(self.effect)} [{_signed(self.low)}, {_signed(self.high)}] "
        return f"{self.name}: {span if self.runs else ''}{self.verdict}"


def claim(
    name: str,
    results: Any,
    *,
    claims: str | Path | Mapping[str, Mapping[str, Any]] | None = None,
    precondition: float | bool | None = None,
    grid: Mapping[Any, tuple[float, float]] | None = None,
    one_seed: bool = False,
) -> Claim:
    r"""Judge one claim: paired differences over runs, a t interval, a verdict against the smallest effect.

    $\bar d \pm \sqrt{\max_f(t_{df_f} s_f)^2 + (1.96 s_q)^2}$ with $d$ = arm - control, paired by base, seed
    and question; $f$ runs over seeds and bases, $s_f$ is the standard error over that factor's means
    (df = their number - 1), and $s_q$ that of the questions that all runs share.
    With one base this is the paired t interval over seeds, widened by the questions.

    Args:
        name: the entry in ``claims.toml``; its fields are explained at the head of that file.
        results: one of four things. A mapping ``arm -> array [S, Q]`` (S seeds, Q questions, the same for all
            arms) or ``[N, S, Q]`` with N base checkpoints in front, each met by every seed; a DataFrame with
            one row per run and the columns ``arm``, ``seed``, optionally ``base``, and metrics whose cells
            hold one number per question (or one number, or the packed text of ``lab.save_table``); what
            ``lab.table`` gives; or None where nothing was run. NaN = the metric does not apply to this
            question; a question counts in a run where all arms of the claim have a number.
        claims: path of the toml file, or its content as a mapping; None: ``claims.toml`` here, in
            ``notebooks/``, or in a folder above.
        precondition: the measured number or truth value of the entry's precondition; None: measured from
            ``results`` where the entry names arm and metric.
        grid: per setting that was tried, the validation scores ``(arm, control)``: shown as the share of
            settings on which the sign holds.
        one_seed: judge a single expensive run by a bootstrap over its questions; the verdict then ends in
            "(questions only, one seed)". An entry may ask for it too.

    Returns:
        A ``Claim``. Its verdict, for an effect turned so that positive is what the paper says, interval
        [low, high] and smallest effect m: *supported* low >= m (and above 0); *right direction* low > 0;
        *opposite* high < 0; *no difference* both ends inside (-m, m); else *inconclusive*. With ``within`` =
        m: *supported* inside (-m, m), *opposite* wholly outside, else *inconclusive*. With ``trend`` the
            effect is the
        fitted change from the first to the last setting, and a step that goes the other way beyond doubt
        takes *supported* down to *right direction*. *Not testable here* where the precondition does not hold.

    Raises:
        ValueError: unknown entry or field, arms missing, fewer than 3 seeds (or 2 bases), arms that are not
            paired, a precondition that was not measured.
        TypeError: results of another kind.

    Source: none (plumbing)
    Basis: the false-verdict rate of this interval is measured in tests/test_lab_claim.py.
    Differs: a percentile bootstrap over seeds excludes zero in 14 to 28 % of null cases at 3 seeds; not used.

    Example:
        >>> entry = {
        ...     "toy": {
        ...         "paper": "A",
        ...         "sentence": "new beats old",
        ...         "arm": "new",
        ...         "control": "old",
        ...         "metric": "accuracy",
        ...         "smallest_effect": 0.02,
        ...     }
        ... }
        >>> runs = {
        ...     "old": [[0.50], [0.51], [0.49]],
        ...     "new": [[0.60], [0.62], [0.58]],
        ... }  # differences .10 .11 .09
        >>> print(claim("toy", runs, claims=entry))  # 0.10 +- 4.303 * 0.01 / sqrt(3)
        toy: +0.100 [+0.075, +0.125] supported
    """
    entry = _entry(name, claims)
    one_seed = one_seed or bool(entry.get("one_seed", False))
    form = "trend" if "trend" in entry else "within" if "within" in entry else "difference"
    arms = [str(a) for a in entry.get("arms", [entry.get("arm")])]
    control = entry.get("control", "")
    shown: dict[str, Any] = {
        "name": name,
        "paper": str(entry.get("paper", "")),
        "sentence": str(entry.get("sentence", "")),
        "arm": arms[0] if len(arms) == 1 else f"{arms[0]} ... {arms[-1]}",
        "control": str(control),
        "metric": str(entry["metric"]),
        "form": form,
        "greater": bool(entry.get("greater", True)),
        "smallest_effect": float(entry["within"] if form == "within" else entry["smallest_effect"]),
        **_reported(entry),
    }
    if results is None:
        return Claim(verdict="not run here", **shown)
    values, runs = _paired(name, entry, results, arms, control)
    bases, seeds = [b for b, _ in runs], [s for _, s in runs]
    _enough(name, bases, seeds, one_seed)
    weights, shift = _weights(name, entry, arms, control)
    difference = np.sum([w * values[arm] for arm, w in weights.items()], axis=0) - shift
    sign = 1.0 if shown["greater"] else -1.0
    effect = float(_interval.run_means(difference).mean())
    measured: dict[str, Any] = (_one_run if one_seed else _many_runs)(
        difference, bases, seeds, sign, shown["smallest_effect"], form
    )
    low, high = sorted((sign * measured["low"], sign * measured["high"]))
    verdict = _verdict(low, high, shown["smallest_effect"], form)
    notes = _planned(entry, bases, seeds, difference)
    wrong = [] if one_seed or form != "trend" else _wrong_steps(values, arms, bases, seeds, sign)
    if wrong:
        verdict = "right direction" if verdict == "supported" else verdict
        notes.append("not monotone: " + ", ".join(wrong))
    held, told = _precondition(name, entry, results, precondition)
    notes += [told] if told else []
    verdict += " (questions only, one seed)" if one_seed else ""
    verdict = verdict if held else "not testable here"
    if isinstance(results, Table) and results.stale:
        verdict = "stale"
        notes.append("table older than its code: " + ", ".join(results.stale))
    means = {arm: float(_interval.run_means(v).mean()) for arm, v in values.items()}
    before = means[arms[0]] if form == "trend" else means.get(str(control), shift)
    return Claim(
        verdict=verdict,
        effect=effect,
        **measured,
        arm_mean=means[arms[-1]],
        control_mean=before,
        error_removed=_error_removed(entry, effect, before, form),
        runs=len(runs),
        seeds=len(set(seeds)),
        bases=len(set(bases)),
        questions=int((~np.isnan(difference)).sum(1).max()),
        sign_share=float((sign * _interval.run_means(difference) > 0).mean()),
        grid_share=_grid_share(grid, sign),
        note="; ".join(notes),
        **shown,
    )


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values, for all claims that are judged together.

    The k-th smallest of n (k from 0) becomes the largest so far of (n - k) p, at most 1.

    Args:
        p: p-values in [0, 1].

    Returns:
        Adjusted p-values in the same order; a claim holds at 5 % over the whole family when its own is <=
        0.05.

    Raises:
        ValueError: a value outside [0, 1].

    Source: none (plumbing)
    Basis: Holm's 1979 procedure, from memory.
    Differs: nothing.

    Example:
        >>> holm([0.01, 0.04, 0.03])  # 3 * .01, then 2 * .03, then max(.06, 1 * .04)
        [0.03, 0.06, 0.06]
    """
    for value in p:
        between("holm", 0, 1, p=float(value))
    return [float(x) for x in _interval.holm(np.asarray(p, dtype=float))] if len(p) else []


def false_verdicts(
    results: Any, arm: str, twin: str, metric: str, *, draws: int = 2000, seed: int = 0
) -> tuple[float, int]:
    """How often the test sees a difference where there is none: an arm against its twin, labels swapped.

    The twin is the same arm trained again with another order of the data. Swapping arm and twin in any run
    changes nothing that is true, so every pattern of swaps is a null case; the share of them whose interval
    leaves out zero is the false-verdict rate of the test on this very data.

    Args:
        results: as in ``claim``.
        arm: the arm.
        twin: its twin.
        metric: the metric's column.
        draws: patterns of swaps, drawn at random; all of them when there are no more than this.
        seed: seed of the draws.

    Returns:
        The share of false verdicts in [0, 1] and the number of patterns it was counted over.

    Raises:
        ValueError: arms missing or not paired, or fewer than 3 seeds.

    Source: none (plumbing)
    Basis: none needed.
    Differs: nothing.

    Example:
        >>> runs = {"sft": [[0.50], [0.52], [0.47]], "again": [[0.51], [0.50], [0.50]]}
        >>> false_verdicts(runs, "sft", "again", "accuracy")  # differences -.01 .02 -.03: 8 patterns
        (0.0, 8)
    """
    positive("false_verdicts", draws=draws)
    runs = _runs("false_verdicts", results, [arm, twin], metric)
    keys = list(runs[arm])
    difference = np.stack([runs[arm][k] - runs[twin][k] for k in keys])
    bases, seeds = [b for b, _ in keys], [s for _, s in keys]
    _enough("false_verdicts", bases, seeds, one_seed=False)
    n = len(keys)
    if 2**n <= draws:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1, 1], size=(draws, n))
    false = 0
    for pattern in signs:
        flipped = difference * pattern[:, None]
        half = _interval.half_width(_interval.spread(flipped, bases, seeds), ALPHA)
        false += abs(_interval.run_means(flipped).mean()) > half
    return float(false) / len(signs), len(signs)


def load_claims(
    claims: str | Path | Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Any], Path]:
    """The entries of ``claims.toml`` and the folder that its paths start from."""
    import tomllib

    if isinstance(claims, Mapping):
        return {k: dict(v) for k, v in claims.items()}, Path()
    if claims is None:
        folders = [Path.cwd(), *Path.cwd().parents]
        places = [
            place
            for folder in folders
            for place in (folder / "claims.toml", folder / "notebooks/claims.toml")
        ]
    else:
        places = [Path(claims)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(
            f"claim: expected claims.toml, got none at {places[0]} or above. Pass claims=path or a dict."
        )
    with found.open("rb") as file:
        content = tomllib.load(file)
    return content.get("claims", {}), found.parent


def _entry(name: str, claims: Any) -> dict[str, Any]:
    entries, _ = load_claims(claims)
    if name not in entries:
        raise ValueError(
            f"claim: expected a name out of {sorted(entries)}, got {name!r}. Write the claim down first."
        )
    entry = dict(entries[name])
    unknown, missing = set(entry) - _FIELDS, {"metric"} - set(entry)
    if not {"arm", "arms"} & set(entry):
        missing.add("arm")
    if not {"smallest_effect", "within"} & set(entry):
        missing.add("smallest_effect")
    if "trend" not in entry and "control" not in entry:
        missing.add("control")
    if unknown or missing:
        raise ValueError(
            f"claim {name}: expected the fields of claims.toml, got unknown {sorted(unknown)}, "
            f"missing {sorted(missing)}."
        )
    for field in ("smallest_effect", "within"):
        if field in entry:
            finite(f"claim {name}", **{field: entry[field]})
            if entry[field] < 0 or (field == "within" and entry[field] == 0):
                raise ValueError(f"claim {name}: expected {field} above 0, got {entry[field]}. It is a size.")
    return entry


def _weights(
    name: str, entry: dict[str, Any], arms: list[str], control: Any
) -> tuple[dict[str, float], float]:
    """The contrast: weight per arm, and the constant to take off."""
    if "trend" in entry:
        x = np.asarray(entry["trend"], dtype=float)
        if len(x) != len(arms) or len(x) < 3 or not (np.diff(x) > 0).all():
            raise ValueError(
                f"claim {name}: expected a growing setting for each of the {len(arms)} arms, got {list(x)}."
            )
        centred = x - x.mean()
        slope = centred / (centred**2).sum() * (x[-1] - x[0])
        return {arm: float(w) for arm, w in zip(arms, slope, strict=True)}, 0.0
    if len(arms) != 1:
        raise ValueError(f"claim {name}: expected one arm, got {arms}. Several arms need trend = [settings].")
    if isinstance(control, int | float) and not isinstance(control, bool):
        return {arms[0]: 1.0}, float(control)
    return {arms[0]: 1.0, str(control): -1.0}, 0.0


def _runs(
    name: str, results: Any, arms: list[str], metric: str
) -> dict[str, dict[tuple[Any, Any], np.ndarray]]:
    """Per arm, per (base, seed): the numbers of all questions; the same runs in one order for every arm."""
    results = results.rows if isinstance(results, Table) else results
    runs: dict[str, dict[tuple[Any, Any], np.ndarray]] = {}
    if isinstance(results, Mapping):
        for arm in arms:
            if arm not in results:
                raise ValueError(f"claim {name}: expected arm {arm!r}, got {sorted(map(str, results))}.")
            array = np.asarray(results[arm], dtype=float)
            if array.ndim not in (2, 3):
                raise ValueError(
                    f"claim {name}: expected {arm} as [seeds, questions] or [bases, seeds, questions], "
                    f"got {list(array.shape)}. One number per run: add a last axis of 1."
                )
            array = array[None] if array.ndim == 2 else array
            runs[arm] = {(b, s): array[b, s] for b in range(array.shape[0]) for s in range(array.shape[1])}
    elif hasattr(results, "columns") and hasattr(results, "itertuples"):
        for column in ("arm", "seed", metric):
            if column not in results.columns:
                raise ValueError(f"claim {name}: expected a column {column!r}, got {list(results.columns)}.")
        has_base = "base" in results.columns
        for arm in arms:
            part = results[results["arm"] == arm]
            if not len(part):
                raise ValueError(f"claim {name}: expected arm {arm!r}, got {sorted(set(results['arm']))}.")
            base = part["base"] if has_base else [0] * len(part)
            keys = list(zip(base, part["seed"], strict=True))
            if len(set(keys)) != len(keys):
                raise ValueError(f"claim {name}: expected one row per arm, base and seed, got {arm!r} twice.")
            numbers = (
                unpack(v) if isinstance(v, str) else np.atleast_1d(np.asarray(v, float)) for v in part[metric]
            )
            runs[arm] = dict(zip(keys, numbers, strict=True))
    else:
        raise TypeError(
            f"claim {name}: expected a mapping arm -> array, a DataFrame, lab.table(...) or None, "
            f"got {type(results).__name__}."
        )
    first = runs[arms[0]]
    order = sorted(first, key=lambda key: (str(key[0]), str(key[1])))
    for arm, cells in runs.items():
        if set(cells) != set(first):
            odd = sorted(set(cells) ^ set(first), key=str)[:3]
            raise ValueError(
                f"claim {name}: expected the same runs (base, seed) in {arms[0]!r} and {arm!r}, got only one "
                f"of them for {odd}. Pairs need both."
            )
    sizes = {len(cells[key]) for cells in runs.values() for key in order}
    if len(sizes) > 1:
        raise ValueError(
            f"claim {name}: expected one number of questions in all runs, got {sorted(sizes)}. "
            "Write NaN for questions that do not apply."
        )
    return {arm: {key: cells[key] for key in order} for arm, cells in runs.items()}


def _paired(
    name: str, entry: dict[str, Any], results: Any, arms: list[str], control: Any
) -> tuple[dict[str, np.ndarray], list[tuple[Any, Any]]]:
    """Per arm the numbers [N, Q], NaN unless all arms of the claim have one; and the N runs (base, seed)."""
    named = list(_weights(name, entry, arms, control)[0])
    runs = _runs(name, results, named, str(entry["metric"]))
    keys = list(runs[named[0]])
    values = {arm: np.stack([runs[arm][key] for key in keys]) for arm in named}
    whole = ~np.isnan(np.stack(list(values.values()))).any(0)
    if not whole.any(1).all():
        raise ValueError(
            f"claim {name}: expected in every run a question with a number for all of {named}, got none in "
            f"run (base, seed) {keys[int(np.argmin(whole.any(1)))]}."
        )
    return {arm: np.where(whole, v, math.nan) for arm, v in values.items()}, keys


def _many_runs(
    difference: np.ndarray, bases: list[Any], seeds: list[Any], sign: float, margin: float, form: str
) -> dict[str, float]:
    terms = _interval.spread(difference, bases, seeds)
    effect, half = float(_interval.run_means(difference).mean()), _interval.half_width(terms, ALPHA)
    beyond = margin - abs(effect) if form == "within" else sign * effect - margin
    return {
        "low": effect - half,
        "high": effect + half,
        "df": min(df for _, df, kind in terms if kind != "questions"),
        "p": _interval.p_value(effect, terms),
        "p_smallest": _interval.p_value(beyond, terms) if beyond > 0 else 1.0,
    }


def _one_run(
    difference: np.ndarray, bases: list[Any], seeds: list[Any], sign: float, margin: float, form: str
) -> dict[str, float]:
    low, high, draws = _interval.bootstrap(difference[0], alpha=ALPHA)
    wrong = (np.abs(draws) >= margin) if form == "within" else (sign * draws <= margin)
    p = 2 * min((draws <= 0).mean(), (draws >= 0).mean())
    questions = float((~np.isnan(difference)).sum() - len(bases) * len(seeds))
    return {
        "low": low,
        "high": high,
        "df": questions,
        "p": min(1.0, float(p)),
        "p_smallest": min(1.0, 2 * float(wrong.mean())),
    }


def _enough(name: str, bases: list[Any], seeds: list[Any], one_seed: bool) -> None:
    if one_seed:
        if len(seeds) != 1:
            raise ValueError(
                f"claim {name}: expected one run with one_seed=True, got {len(seeds)}. Leave it out."
            )
        return
    n = len(set(seeds))
    if n < 3:
        raise ValueError(
            f"claim {name}: expected at least 3 seeds, got {n}. Run more, or pass one_seed=True for one run."
        )
    if len(set(bases)) == 2:
        raise ValueError(
            f"claim {name}: expected 1 base or at least 3, got 2. Two give no interval; use one or three."
        )


def _verdict(low: float, high: float, margin: float, form: str) -> str:
    """The verdict of an interval that is turned so that positive is what the paper says."""
    inside = -margin < low and high < margin
    if form == "within":
        return "supported" if inside else "opposite" if low > margin or high < -margin else "inconclusive"
    if low >= margin and low > 0:
        return "supported"
    if low > 0:
        return "right direction"
    if high < 0:
        return "opposite"
    return "no difference" if inside else "inconclusive"


def _wrong_steps(
    values: dict[str, np.ndarray], arms: list[str], bases: list[Any], seeds: list[Any], sign: float
) -> list[str]:
    wrong = []
    for before, after in pairwise(arms):
        step = sign * (values[after] - values[before])
        half = _interval.half_width(_interval.spread(step, bases, seeds), ALPHA)
        if _interval.run_means(step).mean() + half < 0:
            wrong.append(f"{before} to {after}")
    return wrong


def _precondition(
    name: str, entry: dict[str, Any], results: Any, given: float | bool | None
) -> tuple[bool, str]:
    """Whether the entry's precondition holds, and what was measured."""
    wanted = entry.get("precondition")
    if wanted is None:
        return True, ""
    text = str(wanted.get("text", "precondition"))
    if given is None and "arm" in wanted:
        cells = _runs(name, results, [str(wanted["arm"])], str(wanted.get("metric", entry["metric"])))
        given = _interval.nan_mean(np.concatenate(list(cells[str(wanted["arm"])].values())))
    if given is None:
        raise ValueError(
            f"claim {name}: expected precondition=, a measured number or bool, got None. Needed: {text}."
        )
    if isinstance(given, bool | np.bool_):
        return bool(given), f"{text}: {'holds' if given else 'does not hold'}"
    finite(f"claim {name}", precondition=float(given))
    held = wanted.get("at_least", -math.inf) <= given <= wanted.get("at_most", math.inf)
    return held, f"{text}: {given:.3f}, {'holds' if held else 'does not hold'}"


def _planned(entry: dict[str, Any], bases: list[Any], seeds: list[Any], difference: np.ndarray) -> list[str]:
    planned = {"seeds": len(set(seeds)), "bases": len(set(bases)), "questions": difference.shape[1]}
    return [f"planned {entry[k]} {k}, ran {n}" for k, n in planned.items() if k in entry and n < entry[k]]


def _reported(entry: dict[str, Any]) -> dict[str, Any]:
    reported = entry.get("reported", {})
    effect, control = float(reported.get("effect", math.nan)), float(reported.get("control", math.nan))
    return {
        "reported": effect,
        "reported_error_removed": effect / (float(entry.get("best", 1.0)) - control),
        "reported_basis": str(reported.get("basis", "")),
    }


def _error_removed(entry: dict[str, Any], effect: float, control: float, form: str) -> float:
    """Share of the control's distance from the best possible score that the arm closes."""
    best = float(entry.get("best", 1.0))
    if form != "difference" or not isinstance(entry["control"], str) or best == control:
        return math.nan
    return effect / (best - control)


def _grid_share(grid: Mapping[Any, tuple[float, float]] | None, sign: float) -> float:
    if not grid:
        return math.nan
    return float(np.mean([sign * (arm - control) > 0 for arm, control in grid.values()]))


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3f}"


def _signed(x: float) -> str:
    return "?" if math.isnan(x) else f"{x:+.3f}"
