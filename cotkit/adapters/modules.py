r"""Modules: small trainable parts that are hung on a model, built by a function.

Conventions: a builder takes one module of the model and returns one that does the same until it is trained;
`inject` puts it in its place. New parameters have the dtype of the module they stand beside (float32 beside
quantized weights). ``targets`` is a regular expression, searched for in the dotted name of a module.

Functions: ``inject`` puts built modules into a model; ``save``, ``load`` their weights, ``fold`` adds them to
the base. ``delta`` LoRA and its relatives (chains, gates, bottlenecks); ``givens`` a rotation of the input;
``chain_linear`` a layer whose first chains are a smaller layer; ``future_heads`` heads that look further
ahead than the next token (CAFT), ``future_logps`` what they, and the model, give the labels;
``error_head`` predicts what the model will get wrong.

Through peft, not here: LoRA, DoRA, OFT, IA3, prompt and prefix tuning, CorDA's start from a decomposed weight
(``LoraConfig(init_lora_weights="corda", corda_config=...)``), one adapter per task (``add_adapter``,
``set_adapter``). A prefix of peft's on top of ``inject(model, "mlp$", lambda m: delta(m, 512, d_in=d,
act=torch.relu, scale=4.0))`` is the mix-and-match adapter; either freezes what it finds, so say in the end
what is trained: ``freeze.only(model, r"prompt_encoder|\.(down|up)\.")``.
"""

import copy
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cotkit import _check
from cotkit.adapters._layers import Chain, Delta, ErrorHead, Givens, split, widths
from cotkit.adapters._wrap import kaiming, place, plain, sizes
from cotkit.tokens import linear_logps
from cotkit.tokens._linear import last_hidden, plain_head
from cotkit.tokens._segments import IGNORED

__all__ = [
    "chain_linear",
    "delta",
    "error_head",
    "fold",
    "future_heads",
    "future_logps",
    "givens",
    "inject",
    "load",
    "save",
]


def inject(model: nn.Module, targets: str, build: Callable[[nn.Module], nn.Module]) -> list[str]:
    r"""Put ``build(module)`` in the place of every module whose name matches, and freeze the rest.

    What ``build`` added is trained, as it set ``requires_grad``; every parameter that the model had before is
    frozen, but for what earlier calls of `inject` added. A module that has several names is built once. When
    anything is refused, the model is left as it was.

    Args:
        model: any module; it is changed in place. Over a 4-bit base the added parts are float32.
        targets: regular expression, searched for in the dotted names: ``r"mlp$"``, ``r"[01]\..*q_proj$"``.
        build: from the module to its replacement, mostly a ``lambda m: delta(m, 8)``.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ValueError: no name matches, one match lies inside another, or ``build`` returns no new module.
        TypeError: ``build`` returns something else than a module.

    Source: none (plumbing)

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> inject(model, r"^2$", lambda m: delta(m, 2))
        ['2']
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 2 * (4 + 2)
        12
    """
    inside = {f"{name}." for name, m in model.named_modules() if "_own" in vars(m)}
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and re.search(targets, name) and not any(name.startswith(prefix) for prefix in inside)
    }
    if not found:
        shown = ", ".join(name for name, _ in list(model.named_modules())[1:6])
        raise ValueError(f"inject: expected targets to match a module, got {targets!r}. Names: {shown}, ...")
    for name in found:
        for outer in found:
            if name.startswith(f"{outer}."):
                raise ValueError(
                    f"inject: expected separate modules, got {outer} and {name} inside it. "
                    f"End the expression with $, or list the names."
                )
    before = {id(p) for p in model.parameters()}
    kept = {id(p) for _, p in _own(model)}
    built: dict[int, nn.Module] = {}
    for name, module in found.items():
        if id(module) in built:
            continue
        new = build(module)
        if not isinstance(new, nn.Module):
            raise TypeError(f"inject: expected build to return an nn.Module, got {type(new).__name__}.")
        if new is module:
            raise ValueError(f"inject: expected build to return a new module for {name}, got the same one.")
        added = [n for n, p in new.named_parameters() if id(p) not in before]
        # plain attribute, by name: a copy of the model, or a pickle, still knows what is its own
        new._own = tuple(added)  # type: ignore[assignment]
        built[id(module)] = new.train(module.training)
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    for name, module in found.items():
        _replace(model, name, built[id(module)])
    return list(found)


def save(model: nn.Module, path: str | Path) -> list[str]:
    """Write what `inject` added to a model into one safetensors file.

    The file is written beside its place and moved there when it is whole.

    Args:
        model: with modules put in by `inject`.
        path: file to write, by custom ``*.safetensors``.

    Returns:
        The names of the tensors in the file: dotted names of the model's parameters.

    Raises:
        ValueError: nothing was injected, or a tensor holds a NaN or an infinity.

    Source: none (plumbing)

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4))
        >>> names = inject(model, "0", lambda m: delta(m, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, folder + "/adapter.safetensors")
        ['0.down.weight', '0.up.weight']
    """
    from safetensors.torch import save_file

    own = {name: p.detach().contiguous() for name, p in _own(model)}
    if not own:
        raise ValueError("save: expected a model with injected modules, got none. Call inject first.")
    for name, tensor in own.items():
        _finite("save", name, tensor)
    path = Path(path)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        save_file(own, part, metadata={"format": "pt"})
        Path(part).replace(path)
    finally:
        Path(part).unlink(missing_ok=True)
    return list(own)


def load(model: nn.Module, path: str | Path) -> list[str]:
    """Read back what `save` wrote, into a model on which the same `inject` was called.

    Everything is checked before the first tensor is copied.

    Args:
        model: with the modules in place, with the weights of any start.
        path: file of `save`.

    Returns:
        The names of the tensors read.

    Raises:
        ValueError: the file is not there or broken; tensors are missing or superfluous; one has another shape
            or dtype, or holds a NaN or an infinity.

    Source: none (plumbing)

    Example:
        >>> made = lambda: nn.Sequential(nn.Linear(3, 4))
        >>> first, second = made(), made()
        >>> names = [inject(m, "0", lambda m: delta(m, 2)) for m in (first, second)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(first, folder + "/adapter.safetensors")
        ...     names = load(second, folder + "/adapter.safetensors")
        >>> torch.equal(first[0].down.weight, second[0].down.weight)
        True
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    own = dict(_own(model))
    try:
        there = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"load: expected a whole safetensors file, got {path}: {error}") from error
    for kind, names in (("lacks", own.keys() - there.keys()), ("also has", there.keys() - own.keys())):
        if names:
            raise ValueError(
                f"load: expected the tensors of the injected modules, but the file {kind} "
                f"{', '.join(sorted(names)[:3])} ({len(names)} in all). "
                f"Call inject as it was called before save."
            )
    for name, tensor in there.items():
        parameter = own[name]
        if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
            raise ValueError(
                f"load: expected {name} as {list(parameter.shape)} {parameter.dtype}, got "
                f"{list(tensor.shape)} {tensor.dtype}. Build the modules as they were built."
            )
        _finite("load", name, tensor)
    with torch.no_grad():
        for name, tensor in there.items():
            own[name].copy_(tensor)
    return list(there)


def fold(model: nn.Module) -> list[str]:
    """Replace every injected module by a plain linear layer that does the same.

    Afterwards the model has the architecture it had, and ``save_pretrained`` stores it as ever. When anything
    is refused, the model is left as it was.

    Args:
        model: with modules put in by `inject`; changed in place. Take a 4-bit model out of 4 bit first,
            ``model.dequantize()``: its base would round the sum.

    Returns:
        The names of the layers that were folded, [] if there are none.

    Raises:
        ValueError: a module cannot be folded (an activation, experts), its base is quantized, its weight is
            tied to another one, or the sum holds a NaN or an infinity.

    Source: none (plumbing)

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4))
        >>> names = inject(model, "0", lambda m: givens(m))
        >>> fold(model), type(model[0]).__name__
        (['0'], 'Linear')
    """
    outer: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if "_own" in vars(module) and not any(name.startswith(f"{n}.") for n in outer):
            outer[name] = module
    everywhere: dict[int, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        everywhere.setdefault(id(p), set()).add(name)
    done: dict[int, nn.Module] = {}
    for name, module in outer.items():
        names = [n for n, m in outer.items() if m is module]
        for p in module.parameters():
            tied = [n for n in everywhere[id(p)] if not any(n.startswith(f"{i}.") for i in names)]
            if tied:
                raise ValueError(
                    f"fold: expected {name} to have a weight of its own, got one tied to {tied[0]}. "
                    f"Untie it first: give the layer a copy, and set config.tie_word_embeddings to False."
                )
        if id(module) not in done:
            if not hasattr(module, "merge"):
                raise ValueError(
                    f"fold: expected modules with a merge(), got {type(module).__name__} at {name}. "
                    f"Only a change of the weight can be folded into it."
                )
            try:
                new = module.merge()  # type: ignore[operator]
            except ValueError as error:
                raise ValueError(f"fold: at {name}: {error}") from error
            _finite("fold", f"{name}.weight", new.weight)
            done[id(module)] = new
    for name, module in outer.items():
        _replace(model, name, done[id(module)])
    return list(outer)


def _own(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that `inject` added."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for name in vars(module).get("_own", ()):
            parameter = module.get_parameter(name)
            found.setdefault(id(parameter), (f"{prefix}.{name}".lstrip("."), parameter))
    return list(found.values())


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = new


def _finite(fn: str, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{fn}: expected finite numbers, got NaN or infinity in {name}. Nothing was changed."
        )


def delta(
    module: nn.Module,
    r: int = 8,
    *,
    d_in: int | None = None,
    d_out: int | None = None,
    scale: float = 1.0,
    act: Callable[[Tensor], Tensor] | None = None,
    bias: bool = False,
    chain: int = 0,
    sequential: bool = False,
    gate: float | None = None,
    tau: float = 0.1,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""A low-rank branch beside a module, or behind it: LoRA, and what differs from it in one place.

    $$y = F(x) + \mathbb{1}[g \ge \tau] \, s \, U (W_n \cdots W_1 \, \phi(D z)), \quad
    z = x \text{ or, sequential, } F(x)$$
    with $U = 0$ and $W_i = I$ at first, so that nothing changes before training.

    The defaults are LoRA with ``scale`` = alpha / r; ``chain=n`` puts n square matrices in the middle (0:
    LoRA,
    1: a mixer, more: LinChain); ``act=torch.relu, scale=4.0`` on the feed-forward block is the scaled
    parallel adapter; ``act=torch.relu, sequential=True`` on ``o_proj`` and ``down_proj`` the bottleneck
    adapter of Houlsby's kind; ``gate=0.15`` a LoRA block that can switch itself off.

    Args:
        module: what computes F(x); frozen by `inject`. The first output of a tuple counts.
        r: >= 1; width of the branch (rank, bottleneck).
        d_in: size of z. None: taken from a linear layer (in sequence: its output).
        d_out: size of y. None: taken from a linear layer, else as ``d_in``.
        scale: s. LoRA: alpha / r. Scaled parallel adapter: 4.
        act: phi, a function of a tensor. None: linear, and only then the branch can be folded into the
            weight.
        bias: a bias, 0 at first, in D and U; only with ``act``.
        chain: n >= 0; number of square matrices.
        sequential: the branch reads F(x).
        gate: first value of g, one trained number per branch; None: no gate, always on. TAPS: 0.15. Add
            ``lam * sum(g.abs()) / L`` over the L gates to the loss: each is the parameter named ``gate``.
        tau: at g >= tau the branch is on. TAPS: 0.1. The gradient of the step is passed straight through
            to g, also when the branch is off; that of U and D is then 0.
        generator: source of the first D, uniform in +-1/sqrt(d_in).

    Returns:
        A module with ``base``, ``down``, ``links``, ``up``, ``gate`` and, where the branch is linear,
        ``merge()``, which gives a plain linear layer.

    Raises:
        ValueError: ``r < 1``, ``chain < 0``, ``bias`` without ``act``, or sizes that must be named.

    Source: LinChain (2024) arXiv:2411.00039 (``chain``)
    Source: Unified view (2021) arXiv:2110.04366 (``act``, ``scale``, ``sequential``)
    Source: Selective LoRA (2025) arXiv:2501.15377 (``gate``)
    Source: CodeAdapter (2023) arXiv:2303.15822 (``act``, ``sequential``)
    Source: TAIL (2023) arXiv:2310.05905 (``act``, ``sequential``)
    Basis: authors' code for the parallel and the sequential adapter (equal numbers) and, of TAPS, for the
        gate; the chain from abstract and summaries.
    Differs: no LayerNorm and no dropout in the branch, which the released adapters offer. The chain starts at
        the identity; the paper's start is not known to us. U starts at exactly 0, where Houlsby's adapters
        start near it. The penalty on the gates is left to the loss.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> lora = delta(layer, 1, scale=0.5)
        >>> _ = nn.init.constant_(lora.down.weight, 3.0), nn.init.constant_(lora.up.weight, 2.0)
        >>> x = torch.tensor([[1.0, 4.0]])
        >>> round((lora(x) - layer(x)).item(), 3)  # 0.5 * 2 * (3 + 12)
        15.0
    """
    _check.integers("delta", r=r, chain=chain)
    _check.at_least("delta", 1, r=r)
    _check.at_least("delta", 0, chain=chain)
    _check.finite("delta", scale=scale, tau=tau, **({} if gate is None else {"gate": gate}))
    if bias and act is None:
        raise ValueError("delta: expected bias only with act, got act=None. A linear branch has none.")
    if d_in is None:
        found = sizes("delta", module)
        d_in, d_out = (found[1] if sequential else found[0]), d_out or found[1]
    return Delta(
        module,
        d_in,
        d_out or d_in,
        r,
        scale=scale,
        act=act,
        bias=bias,
        chain=chain,
        sequential=sequential,
        gate=gate,
        tau=tau,
        generator=generator,
    )


def givens(linear: nn.Module, *, free: bool = False) -> nn.Module:
    r"""Rotate the input of a linear layer by d - 1 angles: an orthogonal change of its weight.

    $y = (R W)^\top x = W^\top R^\top x$ for W [in, out], $R = P_1 P_2 \cdots$; level $P_r$ rotates the
    pairs of coordinates $(2^r k, 2^r k + 2^{r-1})$, each by an angle of its own. All lengths and the singular
    values of the weight stay what they were. ``free``: each 2 x 2 block is any matrix, kept near a
    rotation by ``penalty()``, the sum of the squared inner products of the two columns (their lengths are
    free).

    Args:
        linear: the layer, frozen by `inject`; d is its input size. What a level leaves over without a partner
            (d is no power of two) goes on to the next as it is.
        free: quasi-orthogonal: 4 (d - 1) numbers instead of d - 1.

    Returns:
        A module with ``base``, ``angle`` [d - 1], 0 at first, or ``block`` [d - 1, 2, 2], the identity at
        first; ``penalty()``, a 0-d tensor, and ``merge()``, a plain linear layer. At first it computes
        exactly what the layer does.

    Raises:
        ValueError: not a linear layer, or d < 2.

    Source: GOFT and qGOFT (2024) arXiv:2404.04316
    Basis: paper; authors' code read and run.
    Differs: the released forward pass rotates every coordinate with its neighbour, at all levels: beyond the
        first one that is no rotation (their d = 4, angles 0.7, -0.4, 0.9: a vector of length 1.327 becomes
        1.208). It also turns the other way round (our angle is minus theirs), takes pi tanh(p) as the
        angle and can scale the coordinates. Ours is the paper's.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(layer.weight)
        >>> turned = givens(layer)
        >>> _ = nn.init.constant_(turned.angle, torch.pi / 2)
        >>> turned(torch.tensor([3.0, 5.0])).round().tolist()  # R^T x
        [5.0, -3.0]
    """
    d, _ = sizes("givens", linear)
    if d < 2:
        raise ValueError(f"givens: expected a layer with two inputs or more, got {d}.")
    return Givens(linear, d, free=free)


def chain_linear(
    linear: nn.Module,
    chains_in: Sequence[int],
    chains_out: Sequence[int],
    *,
    expand: tuple[int, int] | None = None,
    zero: bool = True,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""A linear layer in chains: chain i of the output sees only the chains 1 .. i of the input.

    $y_i = W_i x_{\le i} + b_i$, a weight that is block lower triangular. The first chains alone are a smaller
    layer: a narrower input gives a narrower output, the same numbers. Several in a row keep the property, and
    so does anything between them that works on each chain apart.

    ``expand`` makes a trained layer the first chain(s) and adds one: the old ones are frozen and do not
    see it, so whatever the new chain learns, the old output stays the same to the bit.

    Args:
        linear: where the weight comes from. What lies above the diagonal of the blocks is dropped, hence a
            layer keeps its function only with one chain.
        chains_in: widths of the input's chains, >= 1, which add up to its size.
        chains_out: widths of the output's chains, as many.
        expand: (in, out) widths of one more chain behind the others; its rows alone are trained.
        zero: the new rows start at 0: the new chain is silent at first. False: they are drawn. In a deep
            model start hidden layers at random and only what reads the last chain at 0 (there the new
            columns of a plain ``nn.Linear`` over all chains): with zeros in both nothing would ever learn.
        generator: source of the new rows, if they are drawn.

    Returns:
        A module with ``weights`` and ``biases``, one per chain, and ``merge()``.

    Raises:
        ValueError: widths that do not add up, differing numbers of chains, a quantized layer; in the forward
            pass an input that ends inside a chain.

    Source: CoLM (2025) arXiv:2505.11820
    Basis: paper.
    Differs: the layer alone. Heads, norms and the loss over all widths are compositions:
        ``nll(linear_logps(h[..., :d], head[:, :d], labels), mask)`` for each prefix d.

    Example:
        >>> layer = nn.Linear(3, 3, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> chained = chain_linear(layer, [1, 2], [2, 1])
        >>> chained(torch.tensor([1.0, 10.0, 100.0])).tolist()
        [1.0, 1.0, 111.0]
        >>> chained(torch.tensor([1.0])).tolist()
        [1.0, 1.0]
    """
    d_in, d_out = sizes("chain_linear", linear)
    wide = widths("chain_linear", "chains_in", chains_in, d_in)
    high = widths("chain_linear", "chains_out", chains_out, d_out)
    if len(wide) != len(high):
        raise ValueError(f"chain_linear: expected as many chains in as out, got {len(wide)} and {len(high)}.")
    weight, bias = plain("chain_linear", linear)
    weights, biases = split(weight, bias, wide, high)
    old = 0
    if expand is not None:
        _check.integers("chain_linear", **{"expand[0]": expand[0], "expand[1]": expand[1]})
        _check.at_least("chain_linear", 1, **{"expand[0]": expand[0], "expand[1]": expand[1]})
        shape = (expand[1], d_in + expand[0])
        old = len(weights)
        weights.append(weight.new_zeros(shape) if zero else kaiming(shape, generator, place(linear)))
        if biases is not None:
            biases.append(weight.new_zeros(expand[1]))
    return Chain(weights, biases, old).train(linear.training)


class _Residual(nn.Module):
    """x + SiLU(W x + b), the identity at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


def future_heads(model: Any, n: int = 4, *, residual: bool = True) -> nn.ModuleList:
    r"""Heads for the tokens behind the next one; head i reads the last hidden state and looks 1 + i ahead.

    $x + \mathrm{SiLU}(Wx + b)$ with $W = b = 0$ at first, or a copy of the model's last block; the model's
    own unembedding turns the result into log-probs, see `future_logps`. They are thrown away after training.

    To train them in ``lab.fit``, hang them on the model, ``model.future = future_heads(model)``, and
    ``del model.future`` in the end.

    Args:
        model: a causal language model of ``transformers``, or its peft wrapper (copy blocks before wrapping).
        n: heads. Authors' code: 4.
        residual: True: one linear layer each, identical to the model's own head before training. False: a
            trainable copy of the last block each.

    Returns:
        ModuleList of n modules, in the model's dtype and on its device, all parameters trainable.

    Raises:
        ValueError: ``n < 1``, no plain linear head, or no list of blocks to copy from.
        TypeError: ``n`` is no integer.

    Source: CAFT (2025) arXiv:2506.07833 add_auxiliary_heads of the released code
    Basis: authors' code; the paper from memory.
    Differs: the default is the linear head; the released runs take a block each (``residual=False``). The
        bias starts at 0 too, so that the head is the identity it is meant to be (the released one
        keeps a random bias). A block is a copy of the last one; the released code copies the last but one and
        trains the heads first, on the hidden state below it, with the model frozen.

    Example:
        >>> from cotkit import lab
        >>> model, tokenizer = lab.load("tiny")
        >>> len(future_heads(model, 2))
        2
    """
    _check.integers("future_heads", n=n)
    _check.at_least("future_heads", 1, n=n)
    head = _head("future_heads", model)
    block = _Residual(head.in_features) if residual else _last_block("future_heads", model)
    heads = nn.ModuleList(copy.deepcopy(block) for _ in range(n)).to(head.weight.device, head.weight.dtype)
    for parameter in heads.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return heads


def future_logps(
    model: Any, heads: nn.ModuleList, batch: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "H B T"], Bool[Tensor, "H B T"]]:
    """Score the labels with the model and with every head: one pass through the model.

    Args:
        model: the model the heads were made for; gradient flows unless it is switched off.
        heads: from `future_heads`; their unembedding is the model's, detached.
        batch: from ``tokens.encode``; ``input_ids`` (or ``inputs_embeds``), ``attention_mask`` and ``labels``
            are read.

    Returns:
        ``logps`` and ``masks``, [1 + n, B, T], for `losses.sft.multi_token`: entry [i, :, t] is what the head
        that reads position t - 1 - i gave ``labels[:, t]``. ``logps[0]`` is ``tokens.model_logps``. The mask
        is False where the label is -100 and where t - 1 - i is before the row's first token; there the
        log-prob is 0.

    Raises:
        ValueError: no plain linear head, or the batch lacks ``input_ids`` or ``labels``.

    Source: CAFT (2025) arXiv:2506.07833 add_auxiliary_heads of the released code
    Basis: authors' code; the paper from memory.
    Differs: no logits [H, B, T, V] are built.

    Example:
        >>> from cotkit import lab, tokens
        >>> model, tokenizer = lab.load("tiny")
        >>> batch = tokens.encode([{"prompt": "1 + 1 =", "completion": " 2"}], tokenizer, malformed="keep")
        >>> logps, masks = future_logps(model, future_heads(model, 2), batch)
        >>> logps.shape == masks.shape == (3, *batch["labels"].shape)
        True
    """
    ids = "inputs_embeds" if "inputs_embeds" in batch else "input_ids"
    for name in (ids, "labels"):
        if name not in batch:
            raise ValueError(
                f"future_logps: expected {name} in the batch, got {sorted(batch)}. Use tokens.encode."
            )
    head = _head("future_logps", model)
    seen: dict[str, Any] = {"args": (), "named": {}}
    hooks = []
    if not all(isinstance(h, _Residual) for h in heads):
        # a copied block wants positions and attention mask just as the model gives them to the last block
        hooks.append(
            _last_block("future_logps", model).register_forward_pre_hook(
                lambda _, args, named: seen.update(args=args[1:], named=named), with_kwargs=True
            )
        )
    try:
        hidden = last_hidden(model, head, {k: batch[k] for k in (ids, "attention_mask") if k in batch})
    finally:
        for hook in hooks:
            hook.remove()
    labels = batch["labels"]
    if hidden is None or hidden.shape[:2] != labels.shape:
        raise ValueError(
            "future_logps: expected a model whose last step is a plain linear head over T positions, got "
            f"{type(model).__name__}."
        )
    labels = labels.to(hidden.device)
    there = batch.get("attention_mask", torch.ones_like(labels)).to(hidden.device).bool()
    named = {k: v for k, v in seen["named"].items() if k != "hidden_states"}
    logps = [linear_logps(hidden, head.weight, labels, bias=head.bias)]
    masks = [nn.functional.pad(labels[:, 1:] != IGNORED, (1, 0))]
    bias = None if head.bias is None else head.bias.detach()
    for i, module in enumerate(heads, 1):
        x = module(hidden) if isinstance(module, _Residual) else module(hidden, *seen["args"], **named)
        x = x[0] if isinstance(x, tuple) else x
        source = _later(there, 1 + i, False)  # is position t - 1 - i a token of the row?
        kept = (labels != IGNORED) & source
        ahead = _later(labels.masked_fill(~kept, IGNORED), -i, IGNORED)  # at t: what t - 1 is to predict
        scored = linear_logps(x, head.weight.detach(), ahead, bias=bias)
        logps.append(_later(scored, i, 0.0))
        masks.append(kept)
    return torch.stack(logps), torch.stack(masks)


def _later(x: Tensor, by: int, fill: Any) -> Tensor:
    """Move the columns to the right by a number of positions, to the left if it is negative."""
    width = x.shape[1]
    by = max(-width, min(width, by))
    gap = x.new_full((len(x), abs(by)), fill)
    return torch.cat([gap, x[:, : width - by]] if by >= 0 else [x[:, -by:], gap], 1)


def _head(fn: str, model: Any) -> nn.Linear:
    head = plain_head(model)
    if head is None:
        raise ValueError(
            f"{fn}: expected a causal language model that ends in a plain linear head, got "
            f"{type(model).__name__}. A soft-cap, a scale, a quantized or adapted head are not supported."
        )
    return head


def _last_block(fn: str, model: Any) -> nn.Module:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    depth = inner.config.get_text_config().num_hidden_layers
    lists = [m for m in inner.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError(
            f"{fn}: expected a list of {depth} blocks in the model, got none. Use residual=True."
        )
    return lists[0][-1]


def error_head(
    d: int, vocab: int, n_layers: int = 1, *, generator: torch.Generator | None = None
) -> nn.Module:
    r"""A small model that predicts another one's mistake, word by word: the least that works as a copilot.

    The mistake at a position is $\ell = \mathrm{onehot}(y) - \mathrm{softmax}(z)$, a vector over the
    vocabulary that adds up to 0. The head reads the pilot's hidden states, averaged over its layers, and the
    mistakes made so far; ``softmax(z) + lam * predicted`` is then better than ``softmax(z)``. Train it on
    ``predicted - mistake``; nothing flows back into the pilot.

    Args:
        d: width of the pilot's hidden states, and of the head.
        vocab: size of the vocabulary V.
        n_layers: >= 0; blocks of causal attention.
        generator: source of the first weights.

    Returns:
        A module ``head(hidden, errors, mask=None) -> [B, T, V]``: ``hidden`` [B, T, D], or [L, B, T, D] to be
        averaged; ``errors`` [B, T, V] the mistakes at all positions, of which position t is shown those
        before t; ``mask`` [B, T] True where there is a token. Both are detached. The output layer starts
        at 0, so at first it predicts no mistake.

    Raises:
        ValueError: a size below 1, or inputs that do not fit each other.

    Source: Transformer Copilot (2025) arXiv:2505.16270
    Basis: second-hand: summaries of the paper; no code was released.
    Differs: one block is attention over the sum of states and earlier mistakes, in place of a copy of the
        pilot's decoder with cross-attention to its states.

    Example:
        >>> head = error_head(4, 3)
        >>> head(torch.randn(2, 5, 4), torch.randn(2, 5, 3)).abs().max().item()
        0.0
    """
    _check.integers("error_head", d=d, vocab=vocab, n_layers=n_layers)
    _check.at_least("error_head", 1, d=d, vocab=vocab)
    _check.at_least("error_head", 0, n_layers=n_layers)
    with torch.random.fork_rng(devices=[]):  # PyTorch's own first values are replaced
        head = ErrorHead(d, vocab, n_layers)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.dim() == 2 and name != "out.weight":
                parameter.copy_(kaiming(tuple(parameter.shape), generator, place(head)))
            elif not name.endswith("norm.weight") and ".before.w" not in name and ".after.w" not in name:
                parameter.zero_()
    return head
