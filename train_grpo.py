"""GRPO for audio question answering: R1-AQA (arXiv 2503.11197).

    accelerate launch train_grpo.py                 # the offline toy: no GPU, no download, a few minutes
    accelerate launch --config_file fsdp.yaml train_grpo.py \\
        --model Qwen/Qwen2-Audio-7B-Instruct --data avqa_train.jsonl --output runs/grpo    # the paper's run

One step takes `prompts_per_step` questions q, each with its audio, split across all processes:

    1. sample      o_1..o_G ~ pi_old(. | q)                      a group of G completions
    2. reward      r_i = accuracy + format,  A_i = (r_i - mean(r)) / (std(r) + 1e-4)
    3. reference   log pi_ref(o_i | q)                           for each token
    4. update      ratio = pi / pi_old,  kl = pi_ref / pi - log(pi_ref / pi) - 1
                   L = - mean_q mean_i mean_t [min(ratio A_i, clip(ratio, 1 - eps, 1 + eps) A_i) - beta kl]

`train` is the whole method, top to bottom; `compute_rewards` is what most people change.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel
from transformers.hf_argparser import HfArg

from checkpoints import save_checkpoint, save_final
from cli import BadInput, check_at_least, is_given, located, parse, progress_bar, run_main
from data import Batch, Example, decode, locations, read_batch, select_rows
from evaluate import log_held_out_accuracy
from model import encode_audio, encoder_is_frozen, sample, sampling_noise, unsharded
from rewards import accuracy_reward, format_reward
from training import Run, TrainConfig, announce, append_rows, check_update, end_run, learning_rate
from training import log_metrics, mean_over_processes, now, read_batches, reference_policy, setup
from training import stop_together, token_means


@dataclass
class Config(TrainConfig):
    output: str = HfArg(default="runs/grpo", help="folder for metrics, checkpoints and the final model")
    group_size: int = HfArg(default=8, help="G, the number of completions per prompt")
    temperature: float = HfArg(default=1.0, help="softmax temperature, for sampling and for log-probs")
    num_iterations: int = HfArg(
        default=1, help="updates per batch of completions; at 1, clipping has no effect"
    )
    beta: float = HfArg(default=0.04, help="KL coefficient; 0: no reference is loaded, kl is logged as 0")
    epsilon: float = HfArg(default=0.2, help="the ratio is clipped to 1 - epsilon .. 1 + epsilon")
    sample_batch: int = HfArg(default=0, help="prompts sampled at a time, to bound the KV cache; 0: all")
    samples_every: int = HfArg(default=50, help="steps between writes to samples.jsonl; 0: never")


# ---------------------------------------------------------------- rewards, advantages, loss


def compute_rewards(examples: list[Example], texts: list[list[str]], prompt: str) -> dict[str, torch.Tensor]:
    """Return each part of the reward by name, as a (B, G) tensor; texts[b][g] is completion g for example b.

    The reward is their sum, and each part is logged as reward_<name>. Change the reward here: an example
    has question, choices, answer, audio (a path) and row, the complete record from your data file. prompt is
    plain, answer or think.
    """
    accuracy = torch.zeros(len(texts), len(texts[0]))  # (B, G)
    well_formed = torch.zeros_like(accuracy)
    for b, example in enumerate(examples):
        for g, completion in enumerate(texts[b]):
            accuracy[b, g] = accuracy_reward(completion, example.answer, prompt)
            well_formed[b, g] = format_reward(completion, prompt)
    return {"accuracy": accuracy, "format": well_formed}


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A (B, G) = (r - mean) / (std + 1e-4) within each group; std divides by G - 1, as in TRL and R1-AQA."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def completion_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x (B, G, T) over the tokens of each completion, then over all completions: mean_i mean_t."""
    return ((x * mask).sum(-1) / mask.sum(-1)).mean()


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, epsilon: float, beta: float):
    """The scalar loss, and (B, G, T) values for metrics (arXiv 2402.03300, eq. 3 and 4).

    logps, old_logps, ref_logps, mask: (B, G, T); advantages: (B, G). ref_logps may be None if beta is 0.
    """
    ratio = torch.exp(logps - old_logps)
    A = advantages[..., None]  # (B, G, 1): one advantage for all tokens of a completion
    unclipped = ratio * A
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon) * A

    log_ref_ratio = torch.zeros_like(logps) if ref_logps is None else ref_logps - logps  # log(pi_ref / pi)
    kl = torch.exp(log_ref_ratio) - log_ref_ratio - 1  # the k3 estimator of KL(pi || pi_ref): never negative

    loss = -completion_mean(torch.min(unclipped, clipped) - beta * kl, mask)
    is_clipped = clipped < unclipped
    return loss, {
        "kl": kl.detach(),
        "clip_fraction_low": (is_clipped & (A < 0)).float(),  # the ratio fell below 1 - epsilon
        "clip_fraction_high": (is_clipped & (A > 0)).float(),  # the ratio rose above 1 + epsilon
    }


# ---------------------------------------------------------------- training


def train(config: Config) -> None:
    check_at_least(config, group_size=2, num_iterations=1, max_steps=1, beta=0, epsilon=0, samples_every=0)
    check_at_least(config, sample_batch=0)
    if config.temperature <= 0:
        raise BadInput(f"--temperature must be above 0, not {config.temperature}")
    # run.model is the bare model, used for sampling. run.policy wraps the same weights for DDP or FSDP2; its
    # forward returns the log-prob of each completion token at the sampling temperature
    run = setup(config, config.temperature, with_reference=config.beta > 0)
    accelerator = run.accelerator
    device = accelerator.device
    batches = read_batches(run)  # one for each remaining step, prepared ahead in a thread
    with stop_together(run, run.first_step):
        fixed_prompts = read_fixed_prompts(run)
    warned = False  # about truncated completions
    progress = progress_bar(
        initial=run.first_step, total=config.max_steps, disable=not accelerator.is_main_process
    )

    for step in range(run.first_step, config.max_steps + 1):
        is_last = step == config.max_steps  # the final pass only saves, evaluates and samples

        # Periodic work: checkpoint, evaluate, sample.
        # stop_together: if any process fails or is told to stop inside the block, all save a checkpoint and
        # stop; without it the others would wait forever
        if step > run.first_step and step % config.save_every == 0:
            save_checkpoint(run, step)
        if run.eval_examples and (is_last or step % config.eval_every == 0):
            with stop_together(run, step):
                log_held_out_accuracy(run, step)
        if config.samples_every and (is_last or step % config.samples_every == 0):
            with stop_together(run, step):
                write_samples(run, fixed_prompts, step)
        if is_last:
            break

        started = now()
        with stop_together(run, step):
            batch = next(batches)  # this process's B prompts; skipped clips are already replaced
        if step in config.skip_steps:
            announce(run, f"step {step}: skipped (listed in --skip_steps)")
            progress.update()
            continue

        # 1. sample G completions for each prompt; mask is True up to and including the first EOS
        with stop_together(run, step):
            ids, mask = sample_groups(run, batch)  # (B, G, T)
        sampled = now()

        # 2. reward each completion, and compare it with its group
        with stop_together(run, step):
            texts = decode(run.processor, run.eos_ids, ids, mask)  # [B][G]
            rewards = compute_rewards(batch.examples, texts, config.prompt)  # {name: (B, G)}
        total_reward = sum(rewards.values())
        advantages = group_advantages(total_reward).to(device)

        # 3. log-probs under the reference, the model as it was before training, without gradients. Under LoRA
        # that is the policy with its adapters off
        ref_logps = None
        if config.beta > 0:
            with reference_policy(run) as reference:
                ref_logps = []
                for rows in run.micro_batches:  # slices of the B prompts
                    logps, _ = reference(select_rows(batch.inputs, rows), ids[rows], mask[rows])
                    ref_logps.append(logps)
                ref_logps = torch.cat(ref_logps)  # (B, G, T)
        scored = now()

        # 4. update the policy, --num_iterations times
        for param_group in run.optimizer.param_groups:
            param_group["lr"] = learning_rate(run, step)
        torch.manual_seed(config.seed + batch.first)  # so that a resumed run draws the same LoRA dropout
        run.policy.train()
        old_logps = torch.empty(ids.shape, device=device)  # filled by the first iteration
        step_loss = 0.0
        token_sums = {}  # for metrics: sums over the tokens of this process
        for iteration in range(config.num_iterations):
            losses = []
            for rows in run.micro_batches:
                # DDP synchronizes gradients in the last micro-batch only. FSDP2 does so in every one;
                # otherwise it would have to keep full, unsharded gradients
                sync_gradients = rows == run.micro_batches[-1] or accelerator.is_fsdp2
                with nullcontext() if sync_gradients else accelerator.no_sync(run.policy):
                    with accelerator.autocast():
                        # entropy is only logged, but has a gradient: for a bonus, subtract it from the loss
                        logps, entropy = run.policy(select_rows(batch.inputs, rows), ids[rows], mask[rows])
                    if iteration == 0:
                        # The policy has not changed since sampling, so pi_old is pi (up to LoRA dropout).
                        # The ratio is 1, and its gradient is that of log pi: REINFORCE plus the KL term
                        old_logps[rows] = logps.detach()
                    loss, token_values = grpo_loss(
                        logps,
                        old_logps[rows],
                        None if ref_logps is None else ref_logps[rows],
                        advantages[rows],
                        mask[rows],
                        config.epsilon,
                        config.beta,
                    )
                    # the micro-batch's weight in the step's loss; DDP or FSDP2 then averages over processes
                    loss = loss / len(run.micro_batches)
                    accelerator.backward(loss)
                losses.append(loss.detach())
                token_values["entropy"] = entropy.detach()
                for name, values in token_values.items():
                    token_sums[name] = token_sums.get(name, 0.0) + (values * mask[rows]).sum()
            step_loss += sum(losses) / config.num_iterations

            # clips in place and returns the norm from before clipping
            grad_norm = float(accelerator.clip_grad_norm_(run.policy.parameters(), 1.0))
            # check_update raises if a loss or the gradient is nan or inf. After the first iteration the step
            # is partly done, so there is no clean state to save
            with stop_together(run, step, can_save=iteration == 0):
                check_update(run, step, batch, losses, grad_norm)
            run.optimizer.step()
            # DDP's gradients are views into its buckets; setting them to None would allocate them again
            run.optimizer.zero_grad(set_to_none=not isinstance(run.policy, DistributedDataParallel))
        updated = now()

        metrics = {
            "reward": total_reward.mean(),
            **{f"reward_{name}": part.mean() for name, part in rewards.items()},
            **completion_metrics(run, texts, ids, mask, total_reward),
            "loss": step_loss,
            # means over all tokens of the step, however the loss averages
            **token_means(run, token_sums, mask.sum() * config.num_iterations),
            "grad_norm": grad_norm,
            "lr": run.optimizer.param_groups[0]["lr"],
            **batch.metrics,  # clips that were cut or skipped
            "seconds_sample": sampled - started,  # includes waiting for the batch
            "seconds_score": scored - sampled,  # rewards and reference
            "seconds_update": updated - scored,
        }
        if device.type == "cuda":
            metrics["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9  # the peak so far
        metrics = mean_over_processes(run, metrics)
        with stop_together(run, step + 1):
            log_metrics(run, step, metrics)
        if metrics["truncated"] > 0.5 and not warned:
            announce(run, f"step {step}: more than half of the completions are cut off at --max_new_tokens")
            warned = True
        names = ("reward", "reward_accuracy", "kl", "entropy")
        progress.set_postfix({name: f"{metrics[name]:.3g}" for name in names if name in metrics})
        progress.update()

    progress.close()
    save_final(run)
    accelerator.print(f"model saved to {config.output}; for a report: python -m tools.report {config.output}")
    end_run(run)


def sample_groups(run: Run, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample G completions for each prompt of the batch: ids and mask (B, G, T).

    If the audio encoder is frozen, its output is added to batch.inputs and reused in scoring and the update.
    """
    config = run.config
    B, G, T = len(batch.examples), config.group_size, config.max_new_tokens
    # one random number per token, determined by the seed and the prompt's position in the run's stream of
    # prompts, so samples depend neither on the batch nor on the number of processes
    noise = sampling_noise(config.seed, batch.first, B, G, T).to(run.accelerator.device)
    n = config.sample_batch or B  # prompts sampled at a time
    parts = []
    run.policy.eval()
    with torch.no_grad(), run.accelerator.autocast(), unsharded(run.policy):
        if encoder_is_frozen(run.model):
            batch.inputs["encoded_audio"] = encode_audio(run.model, batch.inputs)
        for rows in [slice(b, b + n) for b in range(0, B, n)]:
            inputs = select_rows(batch.inputs, rows)
            with located(f"batch of {locations(batch.examples[rows])}", BadInput):
                parts.append(sample(run.model, inputs, run.eos_ids, T, config.temperature, noise[rows]))

    # each part is as long as its longest completion: pad all to the longest part
    T = max(ids.shape[2] for ids, _ in parts)
    ids = [pad(ids, (0, T - ids.shape[2]), value=run.eos_ids[0]) for ids, _ in parts]
    mask = [pad(mask, (0, T - mask.shape[2]), value=False) for _, mask in parts]
    return torch.cat(ids), torch.cat(mask)


def completion_metrics(run: Run, texts: list[list[str]], ids, mask, rewards) -> dict:
    """Metrics of completions. texts: [B][G]; ids, mask: (B, G, T); rewards: (B, G)."""
    reward_std = rewards.std(1)  # (B,)
    lengths = mask.sum(-1).float()  # (B, G)
    has_ended = torch.isin(ids, torch.tensor(run.eos_ids, device=ids.device)).any(-1)  # (B, G)
    metrics = {
        "reward_std": reward_std.mean(),
        "zero_std_groups": (reward_std == 0).float().mean(),  # all advantages are 0: only KL has a gradient
        "completion_tokens": lengths.mean(),
        "truncated": (~has_ended).float().mean(),
        "unique_completions": sum(len(set(group)) for group in texts) / len(texts),  # per group, 1 to G
    }
    if run.config.prompt == "think":
        thoughts = [text.partition("<answer>")[0] for group in texts for text in group]
        tokenized = run.processor.tokenizer(thoughts, add_special_tokens=False)["input_ids"]
        thinking_tokens = sum(len(tokens) for tokens in tokenized) / len(thoughts)
        metrics["thinking_tokens"] = thinking_tokens
        metrics["answer_tokens"] = lengths.mean() - thinking_tokens
    return metrics


def read_fixed_prompts(run: Run) -> Batch:
    """Up to five prompts from the start of the run, sampled again every --samples_every steps."""
    count = min(5, run.config.prompts_per_step, len(run.examples))
    batch = read_batch(run.processor, run.examples, run.config, 0, count)
    batch.inputs = {name: value.to(run.accelerator.device) for name, value in batch.inputs.items()}
    return batch


def write_samples(run: Run, batch: Batch, step: int) -> None:
    """Sample the fixed prompts, append the groups to samples.jsonl and print one, without an update.

    Prompts and random numbers are the same every time, so any change comes from the policy.
    """
    ids, mask = sample_groups(run, batch)
    texts = decode(run.processor, run.eos_ids, ids, mask)
    rewards = sum(compute_rewards(batch.examples, texts, run.config.prompt).values())
    advantages = group_advantages(rewards)
    lines = []
    for b, example in enumerate(batch.examples):
        line = {
            "step": step,
            "audio": example.audio,
            "question": example.question,
            "choices": example.choices,
            "answer": example.answer,
            "completions": texts[b],
            "rewards": rewards[b].tolist(),
            "advantages": [round(A, 4) for A in advantages[b].tolist()],
        }
        lines.append(line)
    append_rows(run, "samples.jsonl", lines)

    first = lines[0]
    announce(run, f"step {step}: {first['question']} {first['choices']} -> {first['answer']}")
    for text, reward, A in zip(first["completions"], first["rewards"], first["advantages"]):
        announce(run, f"  reward {reward:.4g}  advantage {A:+.2f}  {text!r}")


def main() -> None:
    config = parse(Config, __doc__)
    if not is_given("--model", "--data"):
        from toy import toy_flags  # neither flag was given: run the offline toy

        config = parse(Config, __doc__, toy_flags("grpo", config))
    train(config)


if __name__ == "__main__":
    run_main(main)
