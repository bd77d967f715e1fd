r"""Token tensors: where the thought is in a text, which tokens count, and how likely the model finds them.

Conventions: B rows, T tokens, V vocabulary, D hidden size. Log-probabilities, entropies and divergences are
in nats. Position t of ``logps`` is the log-probability of ``labels[:, t]``: labels are never shifted by the
caller, position 0 is exactly 0, and so is every position whose label is -100. ``mask`` is bool, True =
counts. Padding is on the right.

Segments: PAD, PROMPT, THOUGHT (exactly the thought's text), ANSWER (the final answer's text), SPECIAL (what
the model must also write: tags, answer markers, white space between, the end token), TOOL (tool output, never
a target).

Functions: ``Format`` and ``FORMATS`` say how a chain is written; ``encode`` turns rows into tensors;
``mask``, ``labels``, ``between`` pick tokens; ``corrupt`` masks the thought (MFT), ``span_corrupt`` with
``UL2_DENOISERS`` cuts spans out (UL2); ``token_logps``, ``linear_logps``, ``model_logps`` score tokens;
``seq_logps``, ``grouped`` reduce them; ``entropy``, ``kl``, ``kl_k2``, ``kl_k3`` compare.
"""

from cotkit.tokens._corrupt import UL2_DENOISERS, corrupt, span_corrupt
from cotkit.tokens._encode import ANSWER, PAD, PROMPT, SPECIAL, THOUGHT, TOOL
from cotkit.tokens._format import FORMATS, Format, Parts
from cotkit.tokens._logps import (
    entropy,
    grouped,
    kl,
    kl_k2,
    kl_k3,
    linear_logps,
    model_logps,
    seq_logps,
    token_logps,
)
from cotkit.tokens._segments import between, encode, labels, mask

__all__ = [
    "ANSWER",
    "FORMATS",
    "PAD",
    "PROMPT",
    "SPECIAL",
    "THOUGHT",
    "TOOL",
    "UL2_DENOISERS",
    "Format",
    "Parts",
    "between",
    "corrupt",
    "encode",
    "entropy",
    "grouped",
    "kl",
    "kl_k2",
    "kl_k3",
    "labels",
    "linear_logps",
    "mask",
    "model_logps",
    "seq_logps",
    "span_corrupt",
    "token_logps",
]
