"""The arms of the supervised sweep: how each method trains, at the price of the same number of SFT steps.

The price of a step is counted in units of one SFT step on the same rows: forward 1/3, backward 2/3, gradients
of activations alone 1/3. Passes made once (reference scores of the training rows) are charged too.
Functions: ``train`` trains a model as one arm; ``base_model`` loads a base checkpoint.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cotkit import lab, tokens
from cotkit.adapters.modules import future_heads, future_logps
from cotkit.lab._model import CHECKPOINTS
from cotkit.losses.regularize import adversarial
from cotkit.losses.sft import ift_inputs, ift_weights, iw_sft, multi_token, nll, poft
from cotkit.select.curriculum import schedule

from sweep_spine import sft_loss  # isort: skip

HERE = Path(__file__).resolve().parent.parent
MORE_BASES = HERE / "out" / "bases"  # pre-trained on demand: python -m cotkit.lab out/bases --seeds 3 4

# Price of one training step and of what is done once per training row, in SFT steps (see above).
STEP_PRICE = {"ift": 4 / 3, "smart": 8 / 3, "scheduled": 4 / 3, "caft": 1.5}
ONCE_PRICE = {"iw_sft": 1 / 3, "iw_token": 1 / 3, "iw_q": 1 / 3, "iw_sum": 1 / 3, "poft": 2 / 3}


@functools.cache
def _weights(base: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = CHECKPOINTS / f"tiny-{base}.safetensors"
    if not path.exists():
        path = MORE_BASES / path.name
        if not path.exists():
            from cotkit.lab._pretrain import make

            make(MORE_BASES, seeds=(base,))
    return {name: value.float() for name, value in load_file(path).items()}


def base_model(base: int) -> tuple[Any, Any]:
    """A fresh copy of base checkpoint ``base`` and its tokenizer; bases past the shipped ones are made."""
    model, tokenizer = lab.load("tiny")
    model.load_state_dict(_weights(base), strict=False)
    with torch.no_grad():  # a mask token that no pre-training has seen starts as the mean, as in MFT's code
        embedding = model.get_input_embeddings().weight
        embedding[tokenizer.mask_token_id] = embedding.mean(0)
    return model, tokenizer


def steps_for(arm: str, steps: int, rows: int, batch: int) -> int:
    """How many steps ``arm`` may take for the price of ``steps`` SFT steps."""
    return max(1, round((steps - ONCE_PRICE.get(arm, 0.0) * rows / batch) / STEP_PRICE.get(arm, 1.0)))


def train(
    arm: str, base: int, rows: list[dict], *, steps: int, lr: float, batch: int, seed: int, settings: dict
) -> tuple[Any, Any]:
    """Train base ``base`` on ``rows`` as ``arm`` does, for the price of ``steps`` SFT steps."""
    model, tokenizer = base_model(base)
    taken = steps_for(arm, steps, len(rows), batch)
    how: dict[str, Any] = {"loss": sft_loss}
    if arm in ("iw_sft", "iw_token", "iw_q", "iw_sum", "poft"):
        rows = with_reference(arm, base, rows, model, tokenizer)
    if arm.startswith("iw"):
        how = {"loss": _iw(arm), "columns": ("ref_logps",)}
    elif arm == "poft":
        how = {"loss": _poft, "columns": ("ref_score",), "unit": "sequence"}
    elif arm == "dft":
        how = {
            "loss": lambda logps, b, denom: nll(logps, b["mask"], weights=logps.detach().exp(), denom=denom)
        }
    elif arm == "ift":
        how = {"loss": _ift, "unit": "sequence", "prepare": ift_prepare(model, settings["ift_lam"])}
    elif arm == "smart":
        how = {"loss": _smart, "forward": smart_forward(settings, seed)}
    elif arm == "caft":
        how = caft(model, tokenizer, rows, taken, batch, seed, settings)
    elif arm.startswith("mft") or arm == "scheduled":
        how["prepare"] = mft_prepare(arm, model, tokenizer, taken, seed, settings)
    elif arm in ("neftune", "dropout"):
        how["prepare"] = noise_prepare(arm, model, taken, seed, settings)
    if arm == "mft_clean":
        how["loss"] = lambda logps, b, _: nll(logps, b["mask"] & ~b["after_noise"])
    order = seed + 1000 * (arm == "sft_again")
    lab.fit(model, tokenizer, rows, steps=taken, lr=lr, batch=batch, seed=order, description=arm, **how)
    if hasattr(model, "future_heads"):
        del model.future_heads
    return model, tokenizer


def _iw(arm: str) -> Callable:
    level = "token" if arm == "iw_token" else "sequence"
    clip = (0.2, 1.8) if arm == "iw_token" else (0.0, 16.0)

    def loss(logps: torch.Tensor, batch: dict, denom: Any) -> torch.Tensor:
        ref = torch.where(batch["mask"], batch["ref_logps"], 0.0)
        scale = arm != "iw_sum"
        return iw_sft(logps, ref, batch["mask"], level=level, clip=clip, length_scale=scale, denom=denom)

    return loss


def _poft(logps: torch.Tensor, batch: dict, denom: Any) -> torch.Tensor:
    scores = tokens.seq_logps(logps, batch["mask"], mean=True)
    return poft(scores, batch["ref_score"].float(), denom=denom)


def _ift(logps: torch.Tensor, batch: dict, denom: Any) -> torch.Tensor:
    weights = ift_weights(-logps, batch["mask"], future=False)  # the paper's: late tokens weigh more
    return nll(logps, batch["mask"], weights=weights, per="sequence", denom=denom)


def _smart(out: tuple, batch: dict, denom: Any) -> torch.Tensor:
    return nll(out[0], batch["mask"], denom=denom) + out[1]


def with_reference(arm: str, base: int, rows: list[dict], model: Any, tokenizer: Any) -> list[dict]:
    """Add the base model's log-probs per token (iw-SFT), or the mean score under two other bases (PoFT)."""
    if arm == "poft":
        aligned = [base_model((base + k) % 5)[0] for k in (1, 2)]
        scores = torch.stack([lab.score(m, tokenizer, rows) for m in aligned]).mean(0)
        return [row | {"ref_score": float(s)} for row, s in zip(rows, scores, strict=True)]
    out = []
    for i in range(0, len(rows), 64):
        batch = tokens.encode(rows[i : i + 64], tokenizer, malformed="keep")
        logps = tokens.model_logps(model, batch)
        out += [row | {"ref_logps": x.tolist()} for row, x in zip(rows[i : i + 64], logps, strict=True)]
    return out


def ift_prepare(model: Any, lam: float) -> Callable:
    """IFT's inputs: embeddings mixed with those of the model's own greedy tokens.

    The table is the model's of this step. The released code has a frozen copy, which here, where the head is
    tied to the embeddings, would drift away from what the model reads when it writes.
    """

    def prepare(batch: dict, _: int) -> dict:
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        table = model.get_input_embeddings()
        batch["inputs_embeds"] = ift_inputs(
            table(batch["input_ids"]), table.weight, logits.argmax(-1), batch["mask"], lam=lam
        )
        return batch

    return prepare


def smart_forward(settings: dict, seed: int) -> Callable:
    """Log-probs and SMART's penalty; the ball's radius is a share of the embeddings' typical size."""
    generator = torch.Generator().manual_seed(seed)

    def forward(model: Any, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        def run(embeds: torch.Tensor) -> torch.Tensor:
            return model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits

        embeds = model.get_input_embeddings()(batch["input_ids"])
        radius = settings["smart_radius"] * float(embeds.detach().pow(2).mean().sqrt())
        logits = run(embeds)
        penalty = adversarial(
            run, embeds, logits, batch["mask"], eps=radius, sigma=radius / 2, eta=radius, generator=generator
        )
        return tokens.token_logps(logits, batch["labels"]), settings["smart_weight"] * penalty

    return forward


def caft(model: Any, tokenizer: Any, rows: list, steps: int, batch: int, seed: int, settings: dict) -> dict:
    """Four future heads, first trained alone on the frozen trunk, then beside it with a fading weight."""
    torch.manual_seed(seed)
    heads = future_heads(model, settings["caft_heads"])
    model.future_heads = heads
    for p in model.parameters():
        p.requires_grad_(False)
    for p in heads.parameters():
        p.requires_grad_(True)

    def forward(m: Any, b: dict) -> tuple:
        return (*future_logps(m, m.future_heads, b), b.get("alpha"))

    def heads_alone(out: tuple, _: dict, __: Any) -> torch.Tensor:
        return multi_token(out[0], out[1], alpha=1.0)  # the trunk's own term is constant here

    lab.fit(
        model, tokenizer, rows, heads_alone, steps=settings["caft_head_steps"], lr=1e-3, batch=batch,
        seed=seed, forward=forward, description="caft heads",
    )  # fmt: skip
    for p in model.parameters():
        p.requires_grad_(True)

    def prepare(b: dict, step: int) -> dict:
        b["alpha"] = torch.tensor(0.01 * schedule(step, steps, 1.0, 0.0, kind="half-sine"))
        return b

    def loss(out: tuple, _: dict, __: Any) -> torch.Tensor:
        return multi_token(out[0], out[1], alpha=float(out[2]))

    return {"loss": loss, "forward": forward, "prepare": prepare}


def warmed_up(rate: float, step: int, steps: int) -> float:
    """MFT's share of noise at a step: rising from 0 over the first two thirds of training."""
    return schedule(step, 2 / 3 * steps + 1, 0.0, rate)


def mft_prepare(arm: str, model: Any, tokenizer: Any, steps: int, seed: int, settings: dict) -> Callable:
    """Masked thought: noise on the inputs of the response, its rate warmed up over two thirds of training."""
    generator = torch.Generator().manual_seed(seed)
    second = arm == "mft_second"
    rate = settings["mft_rate_second" if second else "mft_rate"]

    def prepare(batch: dict, step: int) -> dict:
        ids, where = batch["input_ids"], batch["mask"]
        now = warmed_up(rate, step, steps)
        replacement = None
        if second:
            where = where & (batch["steps"] % 2 == 1)
        if arm == "mft_source":
            where = tokens.mask(batch["segments"], tokens.PROMPT)
        elif arm == "mft_random":
            replacement = torch.randint(0, len(tokenizer), ids.shape, generator=generator)
        elif arm == "scheduled":
            with torch.no_grad():
                logits = model(ids, attention_mask=batch["attention_mask"]).logits / settings["tau"]
            drawn = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1, generator=generator)
            replacement = drawn.view(ids.shape).roll(1, 1)
        mask_id = tokenizer.mask_token_id if replacement is None else None
        noisy, noised = tokens.corrupt(
            ids, where, now, mask_id=mask_id, replacement=replacement, generator=generator
        )
        batch["input_ids"] = noisy
        batch["after_noise"] = noised.roll(1, 1)
        return batch

    return prepare


def noise_prepare(arm: str, model: Any, steps: int, seed: int, settings: dict) -> Callable:
    """NEFTune's uniform noise, or dropout, on the embeddings of a share of the response tokens."""
    generator = torch.Generator().manual_seed(seed)
    rate = settings["mft_rate"]

    def prepare(batch: dict, step: int) -> dict:
        now = warmed_up(rate, step, steps)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        hit = (torch.rand(batch["mask"].shape, generator=generator) < now) & batch["mask"]
        if arm == "neftune":
            size = settings["neftune_alpha"] / math.sqrt(embeds.shape[1] * embeds.shape[2])
            other = embeds + size * (2 * torch.rand(embeds.shape, generator=generator) - 1)
        else:
            other = torch.zeros_like(embeds)  # dropout with q = 1: the whole token is wiped
        batch["inputs_embeds"] = torch.where(hit[..., None], other, embeds)
        return batch

    return prepare
