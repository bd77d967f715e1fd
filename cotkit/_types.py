"""Shape aliases shared by every signature; Shift-Tab expands them.

Dimensions: B rows, T tokens, V vocabulary, K candidates of one prompt, D hidden size, N rows of a flat batch.
Aliases carry the dtype family and the names of the dimensions (``dim_str``), so the tests build arguments
from them.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Loss = Float[Tensor, ""]
Logits = Float[Tensor, "B T V"]
Hidden = Float[Tensor, "B T D"]
HeadWeight = Float[Tensor, "V D"]
HeadBias = Float[Tensor, "V"]
TokenLogps = Float[Tensor, "B T"]
TokenValues = Float[Tensor, "B T"]
TokenWeights = Float[Tensor, "B T"]
TokenIds = Int[Tensor, "B T"]
Segments = Int[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]
SeqLogps = Float[Tensor, "B"]
SeqWeights = Float[Tensor, "B"]
Scores = Float[Tensor, "B K"]
Rank = Int[Tensor, "B K"]
Valid = Bool[Tensor, "B K"]
Denom = int | float | Tensor | None
