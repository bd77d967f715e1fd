"""Quality: which rows are worth training on, and how often.

Conventions: one score per row, larger is better; the result is a list of row numbers, so
``[rows[i] for i in strata(scores)]`` are the rows.
Functions: ``strata`` a row once for every percentile that it reaches.
"""

from collections.abc import Sequence

import numpy as np

from cotkit import _check

__all__ = ["strata"]


def strata(scores: Sequence[float], percentiles: Sequence[float] = (90, 95, 98)) -> list[int]:
    r"""Quality strata of iw-SFT(Q): a row once for every percentile that its score reaches.

    One graded score becomes several yes-or-no rewards $1[R \ge r_i]$; adding up their bounds is fine-tuning
    on the multiset in which a row appears once per threshold that it reaches: the better, the more often.

    Args:
        scores: quality of each row, larger is better, finite.
        percentiles: cut-offs in percent of *all* scores, linear between two rows. Authors' control code:
            90, 95, 98, so the best 2 % come three times, the next 3 % twice, the next 5 % once.

    Returns:
        Row numbers, one stratum after the other in the order of ``percentiles``, ascending inside each.

    Raises:
        ValueError: no scores, a score that is not finite, no percentile or one outside [0, 100].

    Source: iw-SFT (2025) arXiv:2507.12856 filter_data_func of the released control code
    Basis: authors' code: equal to its strata; the paper second-hand.
    Differs: nothing; a row *at* a threshold is in, so rows that share a score share their strata, and a
        stratum can hold more rows than its percentile says. A row without reward has no place in the data:
        leave it out of the result where more than the lowest percentile of the rows have none.

    Example:
        >>> strata([0.3, 0.9, 0.1, 0.5], percentiles=(50, 75))  # thresholds 0.4 and 0.6
        [1, 3, 1]
    """
    values = np.asarray(list(scores), dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f"strata: expected one finite score per row, got shape {list(values.shape)}"
            f"{', not all finite' if values.size else ''}. Leave out rows without a score."
        )
    if not len(percentiles):
        raise ValueError("strata: expected percentiles, got none.")
    for percentile in percentiles:
        _check.between("strata", 0, 100, percentiles=percentile)
    cuts = [np.percentile(values, p) for p in percentiles]
    return [int(i) for cut in cuts for i in np.flatnonzero(values >= cut)]
