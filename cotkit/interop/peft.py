"""From a trained adapter back to a plain model, also when the base sits in 4 bit.

Conventions: adapters come from peft, 4-bit bases from bitsandbytes; nothing is trained here.
Functions: ``merged`` folds an adapter into full-precision weights.
"""

import tempfile
from typing import Any

__all__ = ["merged"]


def merged(model: Any) -> Any:
    """Fold a trained adapter into its base and give back a plain model.

    peft's ``merge_and_unload`` on a 4-bit base rounds the sum to 4 bit again, which moves the outputs by more
    than most training did; the full-precision base is another network than the one the adapter was trained
    on. Here the base is first taken out of 4 bit, as it was used in training, and the adapter is added to
    that.

    Args:
        model: a ``peft.PeftModel`` over a full-precision or 4-bit base. It is used up: work with what is
            returned.

    Returns:
        A ``transformers`` model without adapter or quantisation, ready for ``save_pretrained``.

    Raises:
        ValueError: ``model`` carries no adapter.

    Source: none (plumbing)

    Example:
        >>> merged(trainer.model).save_pretrained("merged")  # doctest: +SKIP
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError(
            f"merged: expected a peft.PeftModel, got {type(model).__name__}. Save a plain model as it is."
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        base = model.unload()
        if getattr(base, "is_quantized", False):
            base = base.dequantize()
        return PeftModel.from_pretrained(base, folder).merge_and_unload()
