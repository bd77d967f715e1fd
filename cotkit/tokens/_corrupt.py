"""Noise in the input: masked thoughts (MFT), spans cut out and asked for (UL2)."""

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from cotkit import _check
from cotkit._types import Mask, TokenIds


def corrupt(
    input_ids: TokenIds,
    mask: Mask,
    rate: float | Float[Tensor, "B"],
    *,
    mask_id: int | None = None,
    replacement: TokenIds | None = None,
    generator: torch.Generator | None = None,
) -> tuple[TokenIds, Mask]:
    r"""Masked thought (MFT): replace random input tokens, and keep every label as it was.

    $\tilde w_i = n_i$ with probability ``rate`` where the mask counts, else $w_i$; the loss stays
    $-\sum_t \log p(w_t \mid \tilde w_{<t})$ with the *clean* $w_t$.

    Args:
        input_ids: clean ids, [B, T].
        mask: which inputs may be replaced. The paper: the whole response, ``labels != -100``.
        rate: probability in [0, 1], one number or one per row [B] (diffusion). The paper: 0.2 to 0.4, rising
            linearly from 0 during the first two thirds of training.
        mask_id: id written in place of a replaced token (paper: a new token ``<mask>``).
        replacement: ids [B, T] to write instead: random ones, or samples of the model (scheduled sampling).
        generator: source of randomness.

    Returns:
        The corrupted ids and ``noised`` [B, T], True where a token was drawn. No 1/(1 - rate) is applied.
        Scoring clean inputs only (the paper's ablation) drops the label that *follows* a noised token: ``mask
        & ~torch.nn.functional.pad(noised, (1, -1))``.

    Raises:
        ValueError: neither or both of ``mask_id`` and ``replacement``; an id below 0 to be written; a rate
            outside [0, 1].
        TypeError: ids that are no integers.

    Source: MFT (2024) arXiv:2403.02178 Eq. 1
    Basis: authors' code
    Differs: nothing; the rate's warm-up is the caller's (``min(p, p * step / (2/3 * total + 1))`` in the
        code). For scheduled sampling the ``replacement`` at t is the token sampled from the logits at t
        - 1; the released code takes that of the logits at t + 1 (``models/modeling_llama.py``).

    Example:
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> corrupt(ids, ids > 5, 1.0, mask_id=0)[0]
        tensor([[5, 0, 0]])
    """
    _check.same_shape("corrupt", input_ids=input_ids, mask=mask)
    _check.boolean("corrupt", mask=mask)
    _check.integer("corrupt", input_ids=input_ids)
    if (mask_id is None) == (replacement is None):
        raise ValueError(
            "corrupt: expected either mask_id or replacement, got both or neither. Pass one of them."
        )
    if mask_id is not None:
        _check.integers("corrupt", mask_id=mask_id)
        _check.at_least("corrupt", 0, mask_id=mask_id)
    if replacement is not None:
        _check.same_shape("corrupt", input_ids=input_ids, replacement=replacement)
        _check.integer("corrupt", replacement=replacement)
        if replacement.device.type == "cpu" and bool((replacement[mask] < 0).any()):
            raise ValueError(
                f"corrupt: expected replacement ids >= 0 under the mask, got {int(replacement[mask].min())}. "
                f"Pass token ids, not labels."
            )
    if isinstance(rate, Tensor):
        _check.floating("corrupt", rate=rate)
        if rate.shape != input_ids.shape[:1]:
            raise ValueError(
                f"corrupt: expected rate as a number or [B], got {list(rate.shape)}. Pass one per row."
            )
        if rate.device.type == "cpu" and not bool(((rate >= 0) & (rate <= 1)).all()):
            raise ValueError(f"corrupt: expected rate in [0, 1], got {rate.tolist()}. It is a probability.")
        rate = rate[:, None]
    else:
        _check.between("corrupt", 0, 1, rate=rate)
    device = input_ids.device if generator is None else generator.device
    drawn = torch.rand(input_ids.shape, generator=generator, device=device).to(input_ids.device)
    noised = mask & (drawn < rate)
    if replacement is None:
        return input_ids.masked_fill(noised, mask_id), noised  # type: ignore[arg-type]
    return torch.where(noised, replacement, input_ids), noised


UL2_DENOISERS: tuple[tuple[str, Mapping[str, float | bool]], ...] = tuple(
    (mode, MappingProxyType(options))
    for mode, options in (
        ("R", {"mean_span": 3.0, "rate": 0.15}),
        ("R", {"mean_span": 8.0, "rate": 0.15}),
        ("S", {"tail": True, "rate": 0.25}),
        ("X", {"mean_span": 3.0, "rate": 0.5}),
        ("X", {"mean_span": 8.0, "rate": 0.5}),
        ("X", {"mean_span": 64.0, "rate": 0.15}),
        ("X", {"mean_span": 64.0, "rate": 0.5}),
    )
)


def span_corrupt(
    ids: Sequence[int],
    *,
    mean_span: float = 3.0,
    rate: float = 0.15,
    tail: bool = False,
    sentinels: Sequence[int],
    rng: random.Random,
) -> tuple[list[int], list[int]]:
    r"""Cut random spans out of a text; the target asks for them, each behind the sentinel that marks its gap.

    $k = \mathrm{clip}(\mathrm{round}(rL), 1, L-1)$ tokens in $m = \max(1, \mathrm{round}(k / \mu))$ spans;
    kept and cut spans alternate, beginning with a kept one, and all ways to divide them are equally likely.

    UL2 draws one of seven denoisers for each text, ``mode, options = rng.choice(UL2_DENOISERS)``, and passes
    ``**options``. A row for a decoder-only model is mode token, input and target in one, ``[mode_id[mode],
    *inputs, *targets, end_id]``, with the loss behind the first ``1 + len(inputs)`` positions only. The
    paper's mode tokens: "[NLU]" for R, "[S2S]" for S, "[NLG]" for X.

    Args:
        ids: token ids of the text, L of them.
        mean_span: $\mu$, mean tokens per span, at least 1.
        rate: $r$, fraction of the tokens that is cut out, in [0, 1]; 0 leaves all as it is.
        tail: cut one span off the end instead (prefix language model, UL2's S); no sentinel is written, and
            ``mean_span`` and ``rng`` are not used.
        sentinels: ids that mark the gaps, in the order in which they are used; none may occur in ``ids``.
        rng: source of randomness.

    Returns:
        ``inputs``, the text with one sentinel in place of each span, and ``targets``, each span behind its
        sentinel. End tokens are the caller's.

    Raises:
        ValueError: fewer than 2 ids, too few sentinels, one that is used twice or occurs in ``ids``, a number
            out of range.

    Source: UL2 (2022) arXiv:2205.05131 §3.1.2
    Basis: authors' code (T5's preprocessors, from which the paper builds its objective); the seven settings
        from a public seqio configuration that cites the paper's table.
    Differs: $rL$ is not computed in float32 (one token more or fewer where it ends in .5: 190 * 0.15); no
        more spans than kept tokens, so that two never touch; the S split is at the fixed ``rate``, where T5's
        ``prefix_lm`` draws the length of the prefix uniformly.

    Example:
        >>> span_corrupt([5, 6, 7, 8], rate=0.25, sentinels=[99], rng=random.Random(0))
        ([5, 6, 7, 99], [99, 8])
    """
    _check.at_least("span_corrupt", 1, mean_span=mean_span)
    _check.between("span_corrupt", 0, 1, rate=rate)
    ids = [int(i) for i in ids]  # a tensor's entries would never equal a sentinel
    length = len(ids)
    if length < 2:
        raise ValueError(
            f"span_corrupt: expected at least 2 ids, got {length}. Something must be left and something cut."
        )
    if rate == 0:
        return list(ids), []
    cut = min(max(round(length * rate), 1), length - 1)
    if tail:
        return list(ids[:-cut]), list(ids[-cut:])
    spans = min(max(round(cut / mean_span), 1), length - cut)
    if len(sentinels) < spans:
        raise ValueError(
            f"span_corrupt: expected {spans} sentinels for {length} ids, got {len(sentinels)}. "
            f"Pass more, or a shorter text."
        )
    if len(set(sentinels)) < len(sentinels) or not set(sentinels).isdisjoint(ids):
        raise ValueError(
            "span_corrupt: expected sentinels that differ and do not occur in ids, got some that do. "
            "Take ids that no text uses."
        )
    inputs: list[int] = []
    targets: list[int] = []
    at = 0
    lengths = zip(_lengths(length - cut, spans, rng), _lengths(cut, spans, rng), strict=True)
    for sentinel, (kept, gone) in zip(sentinels, lengths, strict=False):
        inputs += [*ids[at : at + kept], sentinel]
        targets += [sentinel, *ids[at + kept : at + kept + gone]]
        at += kept + gone
    return inputs, targets


def _lengths(total: int, parts: int, rng: random.Random) -> list[int]:
    """Divide ``total`` things into ``parts`` non-empty lots."""
    edges = sorted(rng.sample(range(1, total), parts - 1))
    return [b - a for a, b in pairwise([0, *edges, total])]
