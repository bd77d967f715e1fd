"""GRPO equals TRL's own loss on the same tensors: ``GRPOTrainer._compute_loss`` and its group statistics."""

import types
from collections import defaultdict

import pytest
import torch
from torch import tensor
from torch.nn.functional import pad

from cotkit.losses.advantage import group
from cotkit.losses.policy import grpo

pytest.importorskip("trl")

LENGTHS = tensor([5, 2, 4])
LONGEST = 8  # max_completion_length


class Stub:
    """What `_compute_loss` reads of a trainer, with the log-probs given instead of a model's."""

    def __init__(self, logps, loss_type, beta, epsilon_high):
        self.logps, self.loss_type, self.beta = logps, loss_type, beta
        self.epsilon_low, self.epsilon_high = 0.2, epsilon_high
        self.args = types.SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1, sapo_temperature_pos=1.0
        )
        self.accelerator = types.SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x)
        self.model = types.SimpleNamespace(training=True)
        self.importance_sampling_level = "token"
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.aux_loss_enabled = self.use_vllm = self._entropy_bonus_enabled = False
        self.current_gradient_accumulation_steps, self.max_completion_length = 1, LONGEST
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, *_, **__):
        return self.logps, torch.zeros_like(self.logps), None


def theirs(logps, old, ref, advantages, mask, *, loss_type, beta, epsilon_high):
    from trl import GRPOTrainer

    ids = torch.zeros_like(logps, dtype=torch.long)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids}
    inputs |= {"completion_mask": mask.long(), "advantages": advantages, "num_items_in_batch": mask.sum()}
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": ref}
    return GRPOTrainer._compute_loss(Stub(logps, loss_type, beta, epsilon_high), None, inputs)


OURS = {
    "grpo": {},
    "bnpo": {"per": "token"},
    "dapo": {"per": "token", "denom": int(LENGTHS.sum())},
    "dr_grpo": {"per": "token", "denom": len(LENGTHS) * LONGEST},
}


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("beta", "epsilon_high"), [(0.0, 0.2), (0.04, 0.28)])
@pytest.mark.parametrize("loss_type", OURS)
def test_grpo_equals_trl(loss_type, beta, epsilon_high, per_token):
    generator = torch.Generator().manual_seed(3)
    logps = (-2 * torch.rand(3, 6, generator=generator, dtype=torch.float64) - 1.5).requires_grad_()
    old, ref = (
        logps.detach() + torch.randn(3, 6, generator=generator, dtype=torch.float64) * s for s in (0.4, 0.15)
    )
    mask = torch.arange(6) < LENGTHS[:, None]
    a = torch.randn((3, 6) if per_token else (3,), generator=generator, dtype=torch.float64)
    options = {"beta": beta, "epsilon_high": epsilon_high}
    want = theirs(logps, old, ref, a, mask, loss_type=loss_type, **options)
    (want_slope,) = torch.autograd.grad(want, logps)
    front = (1, 0)  # TRL drops the first position, we keep it
    x, o, r, m = (pad(t, front) for t in (logps, old, ref, mask))
    got = grpo(x, o, pad(a, front) if per_token else a, m, ref_logps=r, **options, **OURS[loss_type])
    (got_slope,) = torch.autograd.grad(got, logps)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_slope, want_slope, rtol=1e-12, atol=1e-12)
    clipped = mask & (want_slope == 0)
    assert beta or clipped.any()  # the case is not an easy one


def test_the_types_of_loss_differ():
    """Rows of different length: no two of the four normalisations agree."""
    logps = torch.full((3, 6), -1.0, dtype=torch.float64)
    mask = torch.arange(6) < LENGTHS[:, None]
    a = tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    values = {grpo(logps, logps, a, mask, **options).item() for options in OURS.values()}
    assert len(values) == 3  # bnpo and dapo agree on one process and one micro-batch


def test_group_equals_trl():
    from trl.trainer.utils import nanstd

    nan = float("nan")
    rewards = tensor(
        [[1.0, 0.0, 0.25, 1.0], [0.5, nan, -2.0, 0.75], [nan, nan, nan, 3.0]], dtype=torch.float64
    )
    centred = rewards - rewards.nanmean(1, keepdim=True)
    # its correction n / (n - 1) is a float32 number
    for scale, want in ((True, centred / (nanstd(rewards, dim=1)[:, None] + 1e-4)), (False, centred)):
        torch.testing.assert_close(group(rewards, scale=scale), want.nan_to_num(nan=0.0), rtol=1e-6, atol=0)
