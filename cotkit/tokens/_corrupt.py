"""Noise in the input: masked thoughts (MFT)."""

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

    Raises:
        ValueError: neither or both of ``mask_id`` and ``replacement``; a rate outside [0, 1].

    Source: MFT (2024) arXiv:2403.02178 Eq. 1
    Basis: authors' code
    Differs: nothing; the rate's warm-up is the caller's (``min(p, p * step / (2/3 * total + 1))`` in the
    code).

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
    _check.same_shape("corrupt", input_ids=input_ids, replacement=replacement)
    return torch.where(noised, replacement, input_ids), noised
