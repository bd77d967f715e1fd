"""What the methods of the reinforcement sweep do with samples: keyword arguments of its loop.

A method is a mapping with some of these: ``credit(drawn, rows, step)`` adds to the samples what the loss
wants; ``loss(out, batch, denom)`` and ``forward(model, batch) -> out`` are those of ``lab.fit``;
``choose(step)`` gives the questions; ``instead(step)`` another batch for a step, or None; ``n`` is the number
of samples of a question; ``temperature`` that of writing. Functions: ``recipe`` gives an arm's; ``by_group``
and ``surrogate`` are GRPO, which is what happens where a recipe says nothing; ``in_order`` deals out the
questions.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from cotkit import lab, tokens
from cotkit.losses import advantage, flow, policy
from cotkit.losses.sft import nll
from cotkit.rewards.answer import accuracy
from cotkit.rewards.length import repeated_ngrams
from cotkit.rewrite.structure import reveal_steps
from cotkit.select.curriculum import schedule

Batch = dict[str, Any]


def in_order(
    rows: list[dict], seed: int, *, steps: int, size: int, easy_first: bool = False
) -> Callable[[int], list[dict]]:
    """A callable ``step -> questions``: each one once before any comes again; easy ones first if asked."""
    rng, order = random.Random(seed), list[dict]()
    while len(order) < steps * size:
        order += rng.sample(rows, len(rows))
    order = order[: steps * size]
    if easy_first:
        order.sort(key=lambda row: row["meta"]["steps"])
    return lambda step: order[step * size : (step + 1) * size]


def by_group(drawn: Batch, rows: list[dict], step: int) -> Batch:  # noqa: ARG001
    """GRPO's credit: how far above its group a sample is."""
    return drawn | {"advantages": advantage.group(drawn["rewards"]).flatten()}


def surrogate(logps: torch.Tensor, batch: Batch, denom: Any) -> torch.Tensor:
    """GRPO's loss on the policy's own samples."""
    old, weights = logps.detach(), batch.get("weights")
    return policy.grpo(logps, old, batch["advantages"], batch["mask"], weights=weights, denom=denom)


def recipe(arm: str, state: dict, model: Any, knob: float, seed: int) -> dict[str, Any]:
    """How an arm turns samples into a step; nothing where it is GRPO's way."""
    s = state["settings"]
    if arm == "online_rft":
        return {"credit": keep, "loss": right_only}
    if arm.startswith("reft"):
        return critic(state, model, s["reft_beta"] if arm == "reft" else 0.0, knob)
    if arm.endswith("aapo"):
        return beside_reference(state, seed)
    if arm.startswith("bon"):
        return best_of(1 if arm == "bon_1" else s["bon"], arm == "bon" and knob > 0)
    if arm in ("tb", "subtb"):
        return (balance if arm == "tb" else prefixes)(state, knob)
    if arm == "weighted":
        return {"credit": by_difficulty}
    if arm in s["temperatures"]:
        return tempered(rule(state) * s["temperatures"][arm])
    if arm == "cosine_repeat":
        return minding_repeats(s["ngram"])
    if arm == "uft":
        return hinted(state, seed, knob)
    if arm in ("srft", "relift"):
        return (demonstrated if arm == "srft" else hardest)(state)
    return {}


def keep(drawn: Batch, rows: list[dict], step: int) -> Batch:  # noqa: ARG001
    """The samples as they are."""
    return drawn


def right_only(logps: torch.Tensor, batch: Batch, denom: Any) -> torch.Tensor:  # noqa: ARG001
    """The likelihood of right samples, nothing else: rejection sampling that never leaves the policy."""
    right = batch["rewards"].flatten() >= 0.5
    return nll(logps, batch["mask"] & right[:, None])


def by_difficulty(drawn: Batch, rows: list[dict], step: int) -> Batch:
    """UniVG-R1: a question weighs more the less of it is solved."""
    weights = torch.exp(1 - drawn["rewards"].mean(1, keepdim=True)).expand_as(drawn["rewards"])
    return by_group(drawn, rows, step) | {"weights": weights.flatten()}


def minding_repeats(n: int) -> dict[str, Any]:
    """A penalty on the very tokens that are repeated, with a discount of its own (0.99)."""

    def credit(drawn: Batch, rows: list[dict], step: int) -> Batch:
        penalty = torch.zeros(drawn["mask"].shape)
        for i, written in enumerate(drawn["mask"]):
            penalty[i, written] = torch.tensor(repeated_ngrams(drawn["input_ids"][i][written], n=n))
        local = advantage.discounted(penalty, drawn["mask"], gamma=0.99)
        drawn = by_group(drawn, rows, step)
        return drawn | {"advantages": drawn["advantages"][:, None] + local}

    return {"credit": credit}


def with_values(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and the value function before each token is written."""
    out = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    values = model.value_head(out.hidden_states[-1])[..., 0]
    return tokens.token_logps(out.logits, batch["labels"]), pad(values[:, :-1], (1, 0))


def critic(state: dict, model: Any, beta: float, weight: float) -> dict[str, Any]:
    """ReFT: PPO with a value head on the policy's own body.

    The head begins as the regression of the first samples' scores on their hidden states, where the authors'
    begins at zero: thirty steps would not be enough to learn it.
    """
    model.value_head = torch.nn.Linear(model.config.hidden_size, 1)

    @torch.no_grad()
    def credit(drawn: Batch, rows: list[dict], step: int) -> Batch:  # noqa: ARG001
        mask, score = drawn["mask"], drawn["rewards"].flatten()
        if step == 0:
            _regress(model, drawn, score[:, None].expand_as(mask)[mask])
        old_logps, old_values = with_values(model, drawn)
        ref = tokens.model_logps(state["model"], drawn)
        paid = advantage.kl_rewards(score, old_logps, ref, mask, beta=beta)
        gains = advantage.gae(paid, old_values, mask)
        found = {"old_logps": old_logps, "old_values": old_values, "returns": gains + old_values}
        return drawn | found | {"advantages": advantage.whiten(gains, mask)}

    def loss(out: tuple, batch: Batch, denom: Any) -> torch.Tensor:
        logps, values = out
        mask = batch["mask"]
        error = policy.clipped_value(values, batch["old_values"], batch["returns"], mask, denom=denom)
        gain = policy.grpo(logps, batch["old_logps"], batch["advantages"], mask, denom=denom)
        return gain + weight * error

    return {"credit": credit, "loss": loss, "forward": with_values}


def _regress(model: Any, drawn: Batch, y: torch.Tensor) -> None:
    """Set the value head to the ridge regression of y on the hidden state before each written token."""
    out = model(drawn["input_ids"], attention_mask=drawn["attention_mask"], output_hidden_states=True)
    x = pad(out.hidden_states[-1][:, :-1], (0, 0, 1, 0))[drawn["mask"]].double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    found = torch.linalg.solve(x.T @ x + 0.01 * len(x) * torch.eye(x.shape[1]), x.T @ y.double())
    model.value_head.weight.copy_(found[None, :-1])
    model.value_head.bias.copy_(found[-1:])


def beside_reference(state: dict, seed: int) -> dict[str, Any]:
    """AAPO: half the samples are the policy's, half those of the frozen start they are compared with."""
    s, right = state["settings"], accuracy()
    half = s["samples"] // 2

    def credit(drawn: Batch, rows: list[dict], step: int) -> Batch:
        other = lab.rollout(
            state["model"], state["tokenizer"], rows, right, half, old_logps=False,
            max_new_tokens=s["max_new_tokens"], seed=500_000 + 1000 * (seed + 1) + step,
        )  # fmt: skip
        return drawn | {"advantages": advantage.aapo(drawn["rewards"], other["rewards"]).flatten()}

    def loss(logps: torch.Tensor, batch: Batch, denom: Any) -> torch.Tensor:  # noqa: ARG001
        return policy.reinforce(logps, batch["advantages"], batch["mask"])

    return {"n": half, "credit": credit, "loss": loss}


def best_of(n: int, positive: bool) -> dict[str, Any]:
    """BoN-aware: the gradient of pass@n; n = 1 is plain REINFORCE with the mean as baseline."""

    def credit(drawn: Batch, rows: list[dict], step: int) -> Batch:  # noqa: ARG001
        weights = advantage.bon(drawn["rewards"], n, positive_only=positive)
        return drawn | {"advantages": weights.flatten()}

    def loss(logps: torch.Tensor, batch: Batch, denom: Any) -> torch.Tensor:
        return policy.reinforce(logps, batch["advantages"], batch["mask"], denom=denom)

    return {"credit": credit, "loss": loss}


def balance(state: dict, tau: float) -> dict[str, Any]:
    """GFlowNet: chains in proportion to the start's probability times exp(reward / tau)."""

    def credit(drawn: Batch, rows: list[dict], step: int) -> Batch:  # noqa: ARG001
        prior = tokens.seq_logps(tokens.model_logps(state["model"], drawn), drawn["mask"])
        return drawn | {"log_r": prior.view_as(drawn["rewards"]) + drawn["rewards"] / tau}

    def loss(logps: torch.Tensor, batch: Batch, denom: Any) -> torch.Tensor:  # noqa: ARG001
        return flow.tb(tokens.seq_logps(logps, batch["mask"]).view_as(batch["log_r"]), batch["log_r"])

    return {"credit": credit, "loss": loss}


def prefixes(state: dict, tau: float) -> dict[str, Any]:
    """GFlowNet over lines: every line may be the last one, and ending pays where its result is the answer.

    The reward of ending after a line is the start's probability of just that times exp(hit / tau).
    """
    tokenizer = state["tokenizer"]
    stop, line_end = tokenizer.convert_tokens_to_ids("</think>"), tokenizer("\n")["input_ids"][-1]

    def forward(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return tokens.token_logps(logits, batch["labels"]), logits.log_softmax(-1)[..., stop]

    @torch.no_grad()
    def credit(drawn: Batch, rows: list[dict], step: int) -> Batch:  # noqa: ARG001
        ids, n = drawn["input_ids"], drawn["rewards"].shape[1]
        ends = drawn["mask"] & (ids == line_end) & ((ids == stop).cumsum(1) == 0)
        places = [row.nonzero()[:, 0] for row in ends]
        shape = (len(places), max(1, max(map(len, places))))
        at, there, hit = torch.zeros(shape).long(), torch.zeros(shape).bool(), torch.zeros(shape)
        texts = [text for texts in drawn["texts"] for text in texts]
        for i, (found, text) in enumerate(zip(places, texts, strict=True)):
            lines, gold = text.split("</think>")[0].split("\n")[:-1], rows[i // n]["answer"]
            if len(found) == len(lines):  # where each line ends in one token
                at[i, : len(found)], there[i, : len(found)] = found, True
                hit[i, : len(found)] = torch.tensor([float(x.rsplit("=", 1)[-1] == gold) for x in lines])
        ref, ref_stop = forward(state["model"], drawn)
        log_r = ref.double().cumsum(1).gather(1, at) + ref_stop.gather(1, at) + hit / tau
        return drawn | {"at": at, "there": there, "log_r": log_r}

    def loss(out: tuple, batch: Batch, denom: Any) -> torch.Tensor:  # noqa: ARG001
        at, there = batch["at"], batch["there"]
        so_far = out[0].double().cumsum(1).gather(1, at)
        lines = torch.where(there, pad(so_far[:, 1:] - so_far[:, :-1], (1, 0)), 0.0)
        stops = torch.where(there, out[1].double().gather(1, at), 0.0)
        return flow.subtb(lines, stops, batch["log_r"], there).float()

    return {"credit": credit, "loss": loss, "forward": forward}


def tempered(temperature: float) -> dict[str, Any]:
    """Writing and training at one temperature: the policy is the tempered model."""

    def forward(model: Any, batch: Batch) -> torch.Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return tokens.token_logps(logits, batch["labels"], temperature=temperature)

    return {"temperature": temperature, "forward": forward}


@torch.no_grad()
def rule(state: dict) -> float:
    """AceReason's temperature: samples drawn at it have the wanted entropy at it (two rounds)."""
    s, found = state["settings"], 1.0
    for seed in (1, 2):
        drawn = lab.rollout(
            state["model"], state["tokenizer"], state["rows"][:64], accuracy(), 1, old_logps=False,
            temperature=found, max_new_tokens=s["max_new_tokens"], seed=seed,
        )  # fmt: skip
        logits = state["model"](drawn["input_ids"], attention_mask=drawn["attention_mask"]).logits
        found = float(policy.entropy_temperature(logits, drawn["mask"], target=s["entropy"]))
    return found


def hinted(state: dict, seed: int, weight: float) -> dict[str, Any]:
    """UFT: the first steps of a reference stand in the prompt, fewer and fewer, and are learned beside."""
    s, tokenizer, rng = state["settings"], state["tokenizer"], random.Random(seed)
    ask, phase = (
        in_order(state["rows"], seed, steps=s["steps"], size=s["prompts"]),
        s["hint_share"] * s["steps"],
    )

    def choose(step: int) -> list[dict]:
        p = schedule(step, phase, 0.95, 0.05, kind="cosine") if step <= phase else 0.0
        return [reveal_steps(row, p, rng=rng) | {"question": row["prompt"]} for row in ask(step)]

    def credit(drawn: Batch, rows: list[dict], step: int) -> Batch:
        hint = torch.zeros_like(drawn["mask"])
        for i, k in enumerate(drawn["group"].tolist()):
            first = len(tokenizer(rows[k]["question"])["input_ids"])
            hint[i, first : len(tokenizer(rows[k]["prompt"])["input_ids"])] = True
        labels = torch.where(hint, drawn["input_ids"], drawn["labels"])
        return by_group(drawn, rows, step) | {"labels": labels, "hint": hint}

    def loss(logps: torch.Tensor, batch: Batch, denom: Any) -> torch.Tensor:
        written = torch.where(batch["mask"], logps, 0.0)
        return surrogate(written, batch, denom) + weight * nll(logps, batch["hint"])

    return {"choose": choose, "credit": credit, "loss": loss}


def with_entropy(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and the entropy of the distribution that each token was drawn from."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return tokens.token_logps(logits, batch["labels"]), pad(tokens.entropy(logits[:, :-1]), (1, 0))


def demonstrated(state: dict) -> dict[str, Any]:
    """SRFT: a reference in the place of one sample of each question, one loss for both."""
    tokenizer = state["tokenizer"]
    fills = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100, "mask": 0}

    def credit(drawn: Batch, rows: list[dict], step: int) -> Batch:  # noqa: ARG001
        given, demos = drawn["rewards"], tokens.encode(rows, tokenizer)
        demos["mask"] = demos["labels"] != -100
        width = max(drawn["labels"].shape[1], demos["labels"].shape[1])
        joined = {}
        for name, fill in fills.items():
            sides = [pad(x[name].long(), (0, width - x[name].shape[1]), value=fill) for x in (drawn, demos)]
            joined[name] = torch.cat(sides)
        demo = torch.arange(given.numel() + len(rows)) >= given.numel()
        gains = advantage.group(torch.cat([given, torch.ones(len(rows), 1)], 1))[:, -1]
        found = {"demo": demo, "advantages": gains, "correct": given.flatten() >= 0.5}
        return joined | found | {"mask": joined["mask"].bool()}

    def loss(out: tuple, batch: Batch, denom: Any) -> torch.Tensor:  # noqa: ARG001
        (demo, own), mask, entropy = (batch["demo"], ~batch["demo"]), batch["mask"], out[1].detach()
        sure = [entropy[mask & side[:, None]].mean() for side in (demo, own)]
        return policy.srft(
            out[0][demo], mask[demo], batch["advantages"], out[0][own], mask[own], batch["correct"], *sure
        )

    how = {"credit": credit, "loss": loss, "forward": with_entropy}
    return how | {"n": state["settings"]["samples"] - 1}


def hardest(state: dict) -> dict[str, Any]:
    """ReLIFT: references of the questions that every sample missed; enough of them make an SFT step."""
    enough, missed = state["settings"]["hard_buffer"], list[dict]()

    def credit(drawn: Batch, rows: list[dict], step: int) -> Batch:
        none = (drawn["rewards"] < 0.5).all(1).tolist()
        missed.extend(row for row, failed in zip(rows, none, strict=True) if failed)
        return by_group(drawn, rows, step)

    def instead(step: int) -> Batch | None:  # noqa: ARG001
        if len(missed) < enough:
            return None
        return tokens.encode([missed.pop() for _ in range(enough)], state["tokenizer"])  # the newest first

    def loss(out: tuple, batch: Batch, denom: Any) -> torch.Tensor:
        if "advantages" in batch:
            return surrogate(out[0], batch, denom)
        return nll(out[0], batch["mask"]) - 1e-4 * out[1][batch["mask"]].mean()

    return {"credit": credit, "instead": instead, "loss": loss, "forward": with_entropy}
