"""Loss and gradient against TRL, if it is installed: pip install trl==1.16.0."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from train_grpo import grpo_loss

trl = pytest.importorskip("trl")


def trl_loss(logps, old_logps, ref_logps, advantages, mask, epsilon, beta):
    """The loss of TRL's trainer for these log-probs, as the trainer itself computes it, and its metrics."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
        accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        model=SimpleNamespace(training=True),
        loss_type="grpo",
        importance_sampling_level="token",
        beta=beta,
        epsilon_low=epsilon,
        epsilon_high=epsilon,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    no_ids = torch.zeros(len(logps), 0, dtype=torch.long)
    inputs = {
        "prompt_ids": no_ids,
        "prompt_mask": no_ids,
        "completion_ids": mask.long(),  # only the shape is used
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old_logps,
        "ref_per_token_logps": ref_logps,
    }
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, trainer._metrics["train"]


@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("epsilon", [0.1, 0.2])
def test_loss_and_gradient_equal_trls(epsilon, beta):
    """On 100 random cases each: equal to the last bit, since both compute the same in the same order."""
    for seed in range(100):
        torch.manual_seed(seed)
        B, G, T = 3, 4, 6
        lengths = torch.randint(1, T + 1, (B, G))
        lengths[0, 0] = T
        mask = torch.arange(T) < lengths[..., None]  # (B, G, T)
        logps, old_logps, ref_logps = (torch.randn(B, G, T) * 0.3 - 2 for _ in range(3))
        logps.requires_grad_()
        advantages = torch.randn(B, G)

        loss, values = grpo_loss(logps, old_logps, ref_logps, advantages, mask, epsilon, beta)
        (gradient,) = torch.autograd.grad(loss, logps)

        rows = [x.flatten(0, 1) for x in (logps, old_logps, ref_logps, advantages, mask)]  # TRL has no groups
        expected, metrics = trl_loss(*rows, epsilon, beta)
        (expected_gradient,) = torch.autograd.grad(expected, logps)
        assert torch.equal(loss, expected), seed
        assert torch.equal(gradient, expected_gradient), seed
        assert values["clip_fraction_low"][mask].mean().item() == metrics["clip_ratio/low_mean"][0]
        assert values["clip_fraction_high"][mask].mean().item() == metrics["clip_ratio/high_mean"][0]
        if beta > 0:
            assert values["kl"][mask].mean().item() == pytest.approx(metrics["kl"][0])
