"""The verl bridge, against a fake of verl's documented signatures; the slow tests against verl itself.

verl is not among our dependencies. What the fake holds is what verl 0.10.0.dev documents: the two registries
with their decorators (a second estimator of one name is refused), how an estimator and a policy loss are
called, and ``global_batch_info``. The numbers here are by hand. The slow tests run where verl can be
imported, in an environment of its own (``pip install --no-deps verl ray tensordict omegaconf ...`` beside
torch and transformers), and compare with verl's own estimators, losses and reward loader.
"""

import importlib
import logging
import math
import pickle
import sys
import tomllib
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from cotkit.interop import verl as bridge
from cotkit.losses import policy
from cotkit.losses.advantage import bon, group
from cotkit.rewards.answer import accuracy
from cotkit.rewards.format import tags
from cotkit.rewards.length import relative

ROOT = Path(__file__).parents[1]
NAMES = ["cotkit_bon", "cotkit_group", "cotkit_grpo", "cotkit_reinforce"]
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
needs_verl = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")


def fake_verl(monkeypatch) -> ModuleType:
    """Put verl.trainer.ppo.core_algos, as documented, into sys.modules."""
    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
        module = ModuleType(name)
        module.__path__ = []
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    algos = sys.modules["verl.trainer.ppo.core_algos"]
    algos.ADV_ESTIMATOR_REGISTRY, algos.POLICY_LOSS_REGISTRY = {}, {}

    def register_adv_est(name):
        def decorator(function):
            if algos.ADV_ESTIMATOR_REGISTRY.get(name, function) != function:
                raise ValueError(f"{name} has already been registered")
            algos.ADV_ESTIMATOR_REGISTRY[name] = function
            return function

        return decorator

    def register_policy_loss(name):
        def decorator(function):
            algos.POLICY_LOSS_REGISTRY[name] = function
            return function

        return decorator

    algos.register_adv_est, algos.register_policy_loss = register_adv_est, register_policy_loss
    return algos


@pytest.fixture
def algos(monkeypatch):
    monkeypatch.delitem(sys.modules, "cotkit.interop._verl_plugin", raising=False)
    made = fake_verl(monkeypatch)
    yield made
    sys.modules.pop("cotkit.interop._verl_plugin", None)


def actor(**counts):
    """What a policy loss reads of verl's ActorConfig."""
    return SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info=counts
    )


# Registration


def entry() -> EntryPoint:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["verl.plugins"].items()
    return EntryPoint(name=name, value=value, group="verl.plugins")


def test_the_entry_point_registers_the_names(algos):
    entry().load()  # all that verl does with it
    assert sorted([*algos.ADV_ESTIMATOR_REGISTRY, *algos.POLICY_LOSS_REGISTRY]) == NAMES
    first = dict(algos.ADV_ESTIMATOR_REGISTRY)
    assert bridge.register() == NAMES  # again, from another hook: nothing changes
    assert first == algos.ADV_ESTIMATOR_REGISTRY


def test_without_verl_the_entry_point_does_nothing(monkeypatch):
    if find_spec("verl") is not None:
        pytest.skip("verl is installed")
    monkeypatch.delitem(sys.modules, "cotkit.interop._verl_plugin", raising=False)
    entry().load()
    assert "verl" not in sys.modules


def test_a_verl_that_moved_its_registries_is_said_aloud(algos, caplog):
    del algos.register_policy_loss
    with caplog.at_level(logging.WARNING), pytest.raises(AttributeError):
        entry().load()
    assert "not registered with verl" in caplog.text


# Estimators


UIDS = ["b", "a", "b", "a", "b", "c"]
DENSE = torch.tensor(  # rewards of tokens, summed over the response; what stands in padding counts nowhere
    [[0.0, 1.0, 0.0], [0.0, 0.0, 0.25], [0.5, 0.0, 9.0], [0.0, 0.0, 2.0], [0.25, -0.25, 0.0], [0.0, 3.0, 0.0]]
)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]])


def test_groups_are_the_rows_of_a_uid(algos):
    bridge.register()
    found = algos.ADV_ESTIMATOR_REGISTRY["cotkit_group"](
        token_level_rewards=DENSE, response_mask=MASK, config=None, index=UIDS
    )
    # b: 1, 0.5, 0: mean 0.5, std 0.5; a: 0.25, 2: mean 1.125, std 0.875 * sqrt(2); c: alone
    a = 0.875 / (0.875 * math.sqrt(2) + 1e-4)
    want = torch.tensor([0.5 / 0.5001, -a, 0.0, a, -0.5 / 0.5001, 0.0])[:, None] * MASK
    for tensor in found:
        torch.testing.assert_close(tensor, want)


def test_options_come_from_the_yaml():
    estimate = bridge.advantage(group)
    plain = {"norm_adv_by_std_in_grpo": False}
    found, _ = estimate(DENSE, MASK, config=plain, index=UIDS)
    want = torch.tensor([0.5, -0.875, 0.0, 0.875, -0.5, 0.0])  # Dr. GRPO: no division
    torch.testing.assert_close(found, want[:, None] * MASK)
    found, _ = estimate(DENSE, MASK, config=plain | {"cotkit": {"scale": True, "eps": 0.5}}, index=UIDS)
    torch.testing.assert_close(found[0, 0], torch.tensor(0.5))  # 0.5 / (0.5 + 0.5)
    right = (DENSE > 0.9).float()
    found, _ = bridge.advantage(bon)(
        right, MASK, config={"cotkit": {"n": 3}, "norm_adv_by_std_in_grpo": True}, index=["q"] * 6
    )
    # right are rows 0, 3, 5 (row 2's 9 is padding): of the 5 others of each 3 fail, 3 * (3/5)^2
    torch.testing.assert_close(found[:, 0], torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0]) * 3 * 0.36)


def test_more_from_verl_is_no_trouble():
    how = {"reward_baselines": torch.zeros(6), "index": UIDS}
    found, _ = bridge.advantage(group)(DENSE, MASK, config=None, **how)
    assert found.shape == MASK.shape


# Policy losses: log-probs, old log-probs and advantages of two rows, the second one token shorter


OLD = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.25, 0.0]], dtype=torch.float64)
NEW = OLD + torch.tensor([[0.5, -0.05, 0.1], [0.2, -0.3, 0.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.0, 1.0, 1.0], [-0.5, -0.5, 0.0]], dtype=torch.float64)
RESPONSE = torch.tensor([[True, True, True], [True, True, False]])


def terms():
    """Of the clipped surrogate with 0.9 and 1.28, term by term."""
    one = [min(math.exp(0.5), 1.28), math.exp(-0.05), math.exp(0.1)]
    two = [-0.5 * math.exp(0.2), -0.5 * max(math.exp(-0.3), 0.9)]
    return one, two


def aggregate(mode, one, two, counts):
    """What verl documents for each mode: with ``dp_size`` workers, since their gradients are averaged."""
    workers, rows = counts.get("dp_size", 1), counts.get("global_batch_size", 2)
    tokens = counts.get("batch_num_tokens", 5)
    both = sum(one) + sum(two)
    return (
        workers
        * {
            "token-mean": both / tokens,
            "token-sum": both,
            "seq-mean-token-sum": both / rows,
            "seq-mean-token-sum-norm": both / rows / counts.get("loss_scale_factor", 3),
            "seq-mean-token-mean": (sum(one) / 3 + sum(two) / 2) / rows,
        }[mode]
    )


@pytest.mark.parametrize(
    "counts",
    [{}, {"dp_size": 4, "batch_num_tokens": 70, "global_batch_size": 16, "loss_scale_factor": 11}],
    ids=["alone", "four workers"],
)
@pytest.mark.parametrize("mode", MODES)
def test_grpo_in_every_mode(mode, counts, algos):
    bridge.register()
    new = NEW.clone().requires_grad_()
    loss, metrics = algos.POLICY_LOSS_REGISTRY["cotkit_grpo"](
        old_log_prob=OLD,
        log_prob=new,
        advantages=ADVANTAGES,
        response_mask=RESPONSE,
        loss_agg_mode=mode,
        config=actor(**counts),
        rollout_is_weights=None,
    )
    one, two = terms()
    assert loss.item() == pytest.approx(-aggregate(mode, one, two, counts), abs=1e-12)
    assert float(metrics["actor/ppo_kl"]) == pytest.approx(-(0.5 - 0.05 + 0.1 + 0.2 - 0.3) / 5)
    loss.backward()
    assert new.grad[0, 0] == 0  # beyond 1.28
    assert new.grad[0, 1] < 0 < new.grad[1, 0]
    assert new.grad[1, 1] == 0  # below 0.9 with a negative advantage
    assert new.grad[1, 2] == 0


def test_rollout_weights_and_an_empty_micro_batch(algos):
    bridge.register()
    weights = torch.tensor([[0.5, 1.0, 2.0], [1.0, 1.5, 7.0]], dtype=torch.float64)
    how = {"response_mask": RESPONSE, "loss_agg_mode": "token-mean", "config": actor()}
    for name in ("cotkit_grpo", "cotkit_reinforce"):
        loss = algos.POLICY_LOSS_REGISTRY[name]
        value, _ = loss(OLD, NEW, ADVANTAGES, rollout_is_weights=weights, **how)
        one, two = terms() if name == "cotkit_grpo" else ([-0.5, -2.05, -0.4], [0.65, 0.275])
        one = [w * t for w, t in zip([0.5, 1.0, 2.0], one, strict=True)]
        two = [w * t for w, t in zip([1.0, 1.5], two, strict=True)]
        assert value.item() == pytest.approx(-(sum(one) + sum(two)) / 5, abs=1e-12)
        for mode in MODES:
            new = NEW.clone().requires_grad_()
            nothing, metrics = loss(OLD, new, ADVANTAGES, torch.zeros(2, 3), mode, actor())
            nothing.backward()
            assert nothing.item() == 0
            assert not new.grad.any()
            assert float(metrics["actor/ppo_kl"]) == 0


def test_the_loss_of_lab_fit_is_a_policy_loss():
    seen = []

    def loss(logps, batch, denom):
        seen.append((sorted(batch), float(denom)))
        return policy.reinforce(logps, batch["advantages"], batch["mask"], denom=denom)

    made = bridge.policy_loss(loss)
    value, _ = made(
        OLD, NEW, ADVANTAGES, RESPONSE.long(), "token-mean", actor(dp_size=2, batch_num_tokens=10)
    )
    assert value.item() == pytest.approx((0.5 + 2.05 + 0.4 - 0.65 - 0.275) / 5, abs=1e-12)
    made(OLD, NEW, ADVANTAGES, RESPONSE, "seq-mean-token-sum-norm", actor(), torch.ones(2, 3))
    assert seen == [
        (["advantages", "mask", "old_logps"], 5.0),
        (["advantages", "mask", "old_logps", "weights"], 6.0),  # two rows of three places
    ]
    rows = bridge.policy_loss(
        lambda logps, b, denom: policy.reinforce(
            logps, b["advantages"], b["mask"], per="sequence", denom=denom
        ),
        unit="sequence",
    )
    value, _ = rows(OLD, NEW, ADVANTAGES, RESPONSE, "seq-mean-token-mean", actor())
    assert value.item() == pytest.approx(((0.5 + 2.05 + 0.4) / 3 - (0.65 + 0.275) / 2) / 2, abs=1e-12)


# Rewards


def test_one_response_is_judged():
    judge = bridge.scorer(accuracy())
    assert judge("gsm8k", "so #### 5", "5") == {"score": 1.0, "acc": 1.0, "scored": 1.0}
    # verl's naive manager calls with keywords, and adds two entries of its own to extra_info
    extra = {"answer": "the whole solution", "question": "2+3?", "num_turns": 2, "rollout_reward_scores": {}}
    found = judge(data_source="gsm8k", solution_str="#### 6", ground_truth="5", extra_info=extra)
    assert found == {"score": 0.0, "acc": 0.0, "scored": 1.0}  # ground_truth, not the column of that name
    nothing = judge("gsm8k", "#### 6", None)
    assert nothing == {"score": 0.0, "acc": 0.0, "scored": 0.0}  # cannot be scored: verl has no word for it
    assert extra["question"] == "2+3?"
    there = pickle.loads(pickle.dumps(judge))
    assert there("gsm8k", "#### 5", "5")["score"] == 1


def test_columns_and_prompt_reach_the_reward():
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [float("nan")]

    found = bridge.scorer(reward, column="solution")("d", "text", "gold", {"question": "q?", "level": 3})
    assert seen == [(["q?"], ["text"], {"question": ["q?"], "level": [3], "solution": ["gold"]})]
    assert found == {"score": 0.0, "acc": 0.0, "scored": 0.0}
    bridge.scorer(reward)("d", "text", "gold", {"prompt": "p", "question": "q?"}, "router", object())
    assert seen[1][0] == ["p"]


def test_rewards_by_name():
    assert bridge.compute_score("d", "#### 5", "5")["score"] == 1
    text = "<think>\n2+3=5\n</think>\n<answer>5</answer>"
    found = bridge.compute_score("d", text, "5", reward="format.tags", options={"names": ["think", "answer"]})
    assert found["score"] == tags(names=["think", "answer"])([None], [text])[0]
    assert bridge.compute_score("d", "ab", "5", reward=f"{__name__}.plain")["score"] == 2.0


def plain(prompts, completions, **columns):  # noqa: ARG001
    return [float(len(c)) for c in completions]


@pytest.mark.errors
def test_refusals():
    with pytest.raises(TypeError, match="advantage: expected a function, got str"):
        bridge.advantage("group")
    with pytest.raises(TypeError, match="policy_loss: expected a function"):
        bridge.policy_loss(None)
    with pytest.raises(ValueError, match="unit to be one of"):
        bridge.policy_loss(plain, unit="group")
    with pytest.raises(TypeError, match="reward as a function"):
        bridge.scorer(3)
    with pytest.raises(ValueError, match="compares a group"):
        bridge.scorer(relative(accuracy()))
    for name in ("answer.acuracy", "nowhere.accuracy", "accuracy"):
        with pytest.raises(ValueError, match=r"room\.function"):
            bridge.compute_score("d", "5", "5", reward=name)
    with pytest.raises(ValueError, match="one uid per row, got none"):
        bridge.advantage(group)(DENSE, MASK)
    with pytest.raises(ValueError, match="got 2 for 6 rows"):
        bridge.advantage(group)(DENSE, MASK, index=["a", "b"])
    with pytest.raises(ValueError, match=r"expected \[3, 3\] from the function, got \[2, 2\]"):
        bridge.advantage(lambda *_, **__: torch.zeros(2, 2))(DENSE, MASK, index=UIDS)
    with pytest.raises(ValueError, match="loss_agg_mode to be one of"):
        bridge.policy_loss(plain)(OLD, NEW, ADVANTAGES, RESPONSE, "seq-mean-token-mean", actor())
    with pytest.raises(ValueError, match="loss_agg_mode to be one of"):
        bridge._grpo(OLD, NEW, ADVANTAGES, RESPONSE, "mean", actor())


# verl itself


@needs_verl
@pytest.mark.slow
def test_real_registries_and_estimator():
    import numpy as np
    from omegaconf import OmegaConf
    from verl.trainer.ppo import core_algos

    entry().load()
    assert bridge.register() == NAMES
    ours = core_algos.get_adv_estimator_fn("cotkit_group")
    uids = np.array(UIDS, dtype=object)
    rewards = torch.where(MASK.bool(), DENSE, 0.0)  # verl adds up what stands in the padding as well
    for scale in (True, False):
        config = OmegaConf.create({"norm_adv_by_std_in_grpo": scale, "cotkit": {"eps": 1e-6}})
        given = {"token_level_rewards": rewards.clone(), "response_mask": MASK, "index": uids}
        found = ours(config=config, **given)
        want = core_algos.compute_grpo_outcome_advantage(norm_adv_by_std_in_grpo=scale, **given)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a[:5], b[:5], rtol=1e-5, atol=1e-6)
        assert not found[0][5].any()  # a group of one: 0 here, its bare reward in verl
        assert float(want[0][5, 0]) == pytest.approx(3.0, abs=1e-4)


@needs_verl
@pytest.mark.slow
def test_real_call_of_an_estimator():
    """Through verl's own ``compute_advantage`` on a ``DataProto``, as its trainer does it."""
    import numpy as np
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    data = DataProto.from_dict(
        tensors={"token_level_rewards": DENSE, "response_mask": MASK},
        non_tensors={"uid": np.array(UIDS, dtype=object)},
    )
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": True, "cotkit": {"eps": 1e-4}})
    done = compute_advantage(data, adv_estimator="cotkit_group", config=config)
    want, _ = bridge.advantage(group)(DENSE, MASK, index=UIDS)
    torch.testing.assert_close(done.batch["advantages"], want)
    torch.testing.assert_close(done.batch["returns"], want)


@needs_verl
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_real_policy_loss(mode):
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    bridge.register()
    weights = torch.tensor([[0.5, 1.0, 2.0], [1.0, 1.5, 7.0]], dtype=torch.float64)
    base = {"strategy": "fsdp", "ppo_micro_batch_size_per_gpu": 1, "rollout_n": 2, "use_dynamic_bsz": True}
    for counts in (
        {},
        {"dp_size": 4, "batch_num_tokens": 70, "global_batch_size": 16, "loss_scale_factor": 11},
    ):
        config = ActorConfig(clip_ratio=0.2, clip_ratio_low=0.1, clip_ratio_high=0.28, **base)
        config.global_batch_info.update(counts)
        values, slopes = [], []
        for name in ("cotkit_grpo", "vanilla"):
            new = NEW.clone().requires_grad_()
            value, metrics = core_algos.get_policy_loss_fn(name)(
                old_log_prob=OLD,
                log_prob=new,
                advantages=ADVANTAGES,
                response_mask=RESPONSE,
                loss_agg_mode=mode,
                config=config,
                rollout_is_weights=weights,
            )
            value.backward()
            values.append((value.item(), float(metrics["actor/ppo_kl"])))
            slopes.append(new.grad)
        assert values[0] == pytest.approx(values[1], rel=1e-7)
        torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-12)


@needs_verl
@pytest.mark.slow
def test_real_reward_loader():
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import get_custom_reward_fn

    how = {"path": "pkg://cotkit.interop.verl", "name": "compute_score"}
    config = {"reward": {"custom_reward_function": {**how, "reward_kwargs": {"reward": "answer.accuracy"}}}}
    judge = get_custom_reward_fn(OmegaConf.create(config))
    assert isinstance(judge, partial)
    found = judge(data_source="d", solution_str="#### 5", ground_truth="5", extra_info={"num_turns": 2})
    assert found == {"score": 1.0, "acc": 1.0, "scored": 1.0}


@needs_verl
@pytest.mark.slow
def test_real_metrics_take_ours():
    from verl.utils.metric import AggregationType, Metric

    _, metrics = bridge._grpo(OLD, NEW, ADVANTAGES, RESPONSE, "token-mean", actor())
    made = Metric.from_dict(metrics, aggregation=AggregationType.MEAN)
    assert made["actor/ppo_kl"].aggregate() == pytest.approx(-0.09)


def test_the_plugin_is_a_file_that_exists():
    assert importlib.util.find_spec(entry().value) is not None
