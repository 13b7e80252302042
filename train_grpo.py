"""GRPO for audio question answering: R1-AQA (arXiv 2503.11197).

    accelerate launch train_grpo.py                 # the offline toy: no GPU, no download, a few minutes
    accelerate launch --config_file fsdp.yaml train_grpo.py \\
        --model Qwen/Qwen2-Audio-7B-Instruct --data avqa_train.jsonl --output runs/grpo    # the paper's run

One step, for each of `prompts_per_step` questions q with their audio:

    1. sample      o_1..o_G ~ pi_old(. | q)                      a group of G completions
    2. reward      r_i = accuracy + format,  A_i = (r_i - mean(r)) / (std(r) + 1e-4)
    3. reference   log pi_ref(o_i | q)                           for each token
    4. update      ratio = pi / pi_old,  kl = pi_ref / pi - log(pi_ref / pi) - 1
                   L = - mean_i mean_t [min(ratio A_i, clip(ratio, 1 - eps, 1 + eps) A_i) - beta kl]
"""

import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data import BadInput, Example, decode, printable, select_rows
from evaluate import held_out_accuracy
from flags import TrainConfig, check_at_least, is_given, parse, run_main
from rewards import accuracy_reward, format_reward
from training import Run, accumulate, draw_groups, finish, followed_batch, generate, log, optimizer_step
from training import policy_logps, reference_logps, setup, steps


@dataclass
class Config(TrainConfig):
    output: str = HfArg(default="runs/grpo", help="folder for metrics, checkpoints and the final model")
    group_size: int = HfArg(default=8, help="G, completions drawn per prompt")
    temperature: float = HfArg(default=1.0, help="divides the logits in sampling and in scoring")
    num_iterations: int = HfArg(default=1, help="updates per rollout; clipping has an effect only above 1")
    beta: float = HfArg(default=0.04, help="weight of the KL; 0 loads no reference, and kl is logged as 0")
    epsilon: float = HfArg(default=0.2, help="the ratio is clipped to 1 - epsilon .. 1 + epsilon")
    samples_every: int = HfArg(default=50, help="steps between the groups in samples.jsonl; 0: none")


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A (B, G) = (r - mean) / (std + 1e-4) within each group; std with G - 1, as in TRL and R1-AQA."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def completion_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x (B, G, T) over the tokens of a completion, then over completions: 1/G sum_i 1/|o_i| sum_t."""
    return ((x * mask).sum(-1) / mask.sum(-1)).mean()


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, epsilon: float, beta: float):
    """The loss, the KL and the share of clipped tokens: three scalars (arXiv 2402.03300, eq. 3 and 4).

    logps, old_logps, ref_logps, mask: (B, G, T); advantages: (B, G). ref_logps may be None where beta is 0.
    """
    ratio, A = torch.exp(logps - old_logps), advantages[..., None]
    unclipped, clipped = ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A
    log_ref_ratio = torch.zeros_like(logps) if ref_logps is None else ref_logps - logps  # log(pi_ref / pi)
    kl = torch.exp(log_ref_ratio) - log_ref_ratio - 1  # the k3 estimator of KL(pi || pi_ref)
    loss = -completion_mean(torch.min(unclipped, clipped) - beta * kl, mask)
    return loss, completion_mean(kl.detach(), mask), completion_mean((clipped < unclipped).float(), mask)


def train(config: Config) -> None:
    check_at_least(config, group_size=2, num_iterations=1, max_steps=1, beta=0, epsilon=0, samples_every=0)
    if config.temperature <= 0:
        raise BadInput(f"--temperature must be above 0, not {config.temperature}")
    run = setup(config, config.temperature, with_reference=config.beta > 0)
    # besides the batch, steps() sees to evaluation, learning rate, checkpoints and signals
    for step, batch in steps(run, held_out_accuracy, followed_groups):
        # 1. sample G completions for each of this process's B prompts; mask: True through the first EOS
        ids, mask = generate(run, batch, config.group_size, config.temperature)  # (B, G, T)

        # 2. reward each completion and compare it with its group
        texts, accuracy, formats, rewards = reward_groups(run, batch.examples, ids, mask)  # [B][G]; (B, G)
        advantages = group_advantages(rewards).to(ids.device)

        # 3. log-probs under the reference: a list of (micro_batch, G, T), or of None where beta is 0
        ref_logps = reference_logps(run, batch, ids, mask)

        # 4. update the policy; until the first update pi is pi_old, so its log-probs serve as old_logps:
        # the ratio is then 1, with the gradient of log pi
        old_logps, results = [], []
        for iteration in range(config.num_iterations):
            for i, rows in enumerate(run.micro_batches):
                with accumulate(run, rows):
                    logps = policy_logps(run, select_rows(batch.inputs, rows), ids[rows], mask[rows])
                    if iteration == 0:
                        old_logps.append(logps.detach())
                    loss, kl, clip_fraction = grpo_loss(
                        logps, old_logps[i], ref_logps[i], advantages[rows], mask[rows],
                        config.epsilon, config.beta,
                    )  # fmt: skip
                    # gradients are averaged over micro-batches here, over processes by DDP or FSDP2
                    run.accelerator.backward(loss / len(run.micro_batches))
                results.append(torch.stack([loss.detach(), kl, clip_fraction]))
            # clips the gradient to norm 1, updates, clears it; refuses results and gradients not finite
            grad_norm = optimizer_step(run, step, batch, results[-len(run.micro_batches) :])

        metrics = group_metrics(run, texts, ids, mask, accuracy, formats, rewards) | {"grad_norm": grad_norm}
        metrics |= zip(("loss", "kl", "clip_fraction"), torch.stack(results).mean(0).tolist())
        log(run, metrics, shown=("reward", "reward_accuracy", "kl"))
    finish(run, held_out_accuracy, followed_groups)


def reward_groups(run: Run, examples: list[Example], ids, mask) -> tuple:
    """Texts [B][G] of completions (B, G, T), and their accuracy, format and reward: (B, G) each."""
    texts, prompt = decode(run.processor, run.eos_ids, ids, mask), run.config.prompt
    accuracy, formats = torch.zeros(ids.shape[:2]), torch.zeros(ids.shape[:2])
    for b, (example, group) in enumerate(zip(examples, texts)):
        accuracy[b] = torch.tensor([accuracy_reward(o, example.answer, prompt) for o in group])
        formats[b] = torch.tensor([format_reward(o, prompt) for o in group])
    rewards = accuracy + formats
    return texts, accuracy, formats, rewards


def group_metrics(run: Run, texts: list[list[str]], ids, mask, accuracy, formats, rewards) -> dict:
    """Metrics of this process's groups. ids, mask: (B, G, T); accuracy, formats, rewards: (B, G)."""
    reward_std, lengths = rewards.std(1), mask.sum(-1).float()  # (B,), (B, G)
    has_ended = torch.isin(ids, torch.tensor(run.eos_ids, device=ids.device)).any(-1)  # (B, G)
    metrics = {
        "reward": rewards.mean(),
        "reward_accuracy": accuracy.mean(),
        "reward_format": formats.mean(),
        "reward_std": reward_std.mean(),
        "zero_std_groups": (reward_std == 0).float().mean(),  # advantage 0: only the KL acts on these
        "completion_tokens": lengths.mean(),
        "truncated": (~has_ended).float().mean(),
        "unique_completions": sum(len(set(group)) for group in texts) / len(texts),  # a group, 1 to G
    }
    if run.config.prompt == "think":
        thoughts = [o.partition("<answer>")[0] for group in texts for o in group]  # with their tags
        tokenized = run.processor.tokenizer(thoughts, add_special_tokens=False)["input_ids"]
        tokens = sum(map(len, tokenized)) / len(thoughts)
        metrics |= {"thinking_tokens": tokens, "answer_tokens": lengths.mean() - tokens}
    return metrics


def followed_groups(run: Run, step: int) -> list[dict]:
    """Rows of samples.jsonl: a few prompts with their groups before `step`; nothing is trained on them.

    The random numbers are the same each time, so that what changes is the policy.
    """
    batch, config = followed_batch(run), run.config
    ids, mask = draw_groups(run, batch, config.group_size, config.temperature)  # (B, G, T)
    texts, _, _, rewards = reward_groups(run, batch.examples, ids, mask)
    numbers, rows = (rewards.tolist(), group_advantages(rewards).tolist()), []
    for example, group, r, A in zip(batch.examples, texts, *numbers):
        row = {"step": step, "audio": example.audio, "question": example.question}
        row |= {"choices": example.choices, "answer": example.answer, "completions": group}
        rows.append(row | {"rewards": r, "advantages": [round(a, 4) for a in A]})
    if run.accelerator.is_main_process:
        show_group(rows[0])
    return rows


def show_group(row: dict) -> None:
    """Print a row of samples.jsonl."""
    lines = [f"step {row['step']}: {row['question']} {row['choices']} -> {row['answer']}"]
    for text, r, A in zip(row["completions"], row["rewards"], row["advantages"]):
        lines.append(f"  reward {r:.0f}  advantage {A:+.2f}  {text!r}")
    tqdm.write(printable("\n".join(lines)))


def main() -> None:
    config = parse(Config, __doc__)
    if not is_given("--model", "--data"):
        from toy import toy_flags  # neither flag is given: the offline toy

        config = parse(Config, __doc__, toy_flags("grpo", config) + sys.argv[1:])
    train(config)


if __name__ == "__main__":
    run_main(main)
