"""GRPO for audio question answering: R1-AQA (arXiv 2503.11197), the whole method in one file.

    accelerate launch train_grpo.py                 # the offline toy: no GPU, no download, a few minutes
    accelerate launch --config_file fsdp.yaml train_grpo.py \\
        --model Qwen/Qwen2-Audio-7B-Instruct --data avqa_train.jsonl --output runs/grpo        # the paper's recipe

One step, for each of `prompts_per_step` questions q with their audio:

    o_1..o_G ~ pi_old(. | q)                    a group of G completions                        sample
    r_i = accuracy + format                     text against text                               rewards.py
    A_i = (r_i - mean(r)) / (std(r) + 1e-4)     good or bad compared with the group             group_advantages
    log pi(o_i | q)                             policy and reference, prompt computed once      shared_prompt_logps
    L = - (clipped surrogate - beta KL)         with rho = pi_theta / pi_old                    grpo_loss

What differs from the paper and from its code, and why:
- Audio and prompt are computed once per group, not G times, in sampling, scoring and update: the same numbers, many times faster.
- The encoder runs as far as there is sound, not always over 30 s: the same numbers.
- Every log-prob is of the distribution that is sampled (logits / temperature), in fp32 from the logits on.
- Accuracy compares text with text. Upstream asks math_verify first, which takes "B. 3" for "D. 3".
- Prompts are never cut. Upstream cuts them to 512 tokens (18 s of audio), but only where it scores.
- Any number of prompts a forward. Upstream tiles the features of several prompts against the order of their masks.
- Master weights are fp32, computation bf16 by accelerate's --mixed_precision: at lr 1e-6 bf16 weights lose the updates.
- No generation_config.json reaches the sampler: Qwen2-Audio's would turn temperature 1 into 0.7 with top-p 0.5.
- A step is one rollout with its `num_iterations` updates (upstream: 1); lr, logs and checkpoints count steps.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache
from transformers.hf_argparser import HfArg

from checkpoints import resume, save_checkpoint, save_final
from data import BadInput, Example, completion_mask, decode, eos_tokens, take
from model import check_memory, embed_prompt, encode_audio, load_frozen, load_policy, prompt_positions
from rewards import accuracy_reward, format_reward
from training import Interrupted, batches, check_at_least, check_finite, leave, parse, prepare, prepare_frozen
from training import read_metrics, run, start, with_whole_weights, write_metrics


@dataclass
class Config:
    model: str = HfArg(default="Qwen/Qwen2-Audio-7B-Instruct", help="hub name or folder of a Qwen2-Audio model")
    data: str = HfArg(default="", help="training questions: JSON or JSON Lines, see README")
    audio_dir: str = HfArg(default="", help="folder of the clips; empty: beside the questions")
    skip_bad_audio: bool = HfArg(default=False, help="pass over clips that cannot be read, and count them, instead of stopping")
    eval_data: str = HfArg(default="", help="questions to measure accuracy on while training; empty: none")
    eval_every: int = HfArg(default=100, help="steps between two such measurements")
    output: str = HfArg(default="runs/grpo", help="folder for metrics, checkpoints and the final model")
    prompt: str = HfArg(default="answer", help="plain, answer or think: prompt, format reward and extraction together")
    group_size: int = HfArg(default=8, help="G, completions drawn per prompt")
    temperature: float = HfArg(default=1.0, help="divides the logits in sampling and in scoring")
    max_new_tokens: int = HfArg(default=256, help="a completion that has not ended by then is cut and counted")
    prompts_per_step: int = HfArg(default=16, help="prompts per step, all processes together")
    micro_batch: int = HfArg(default=1, help="prompts in one scored forward on one process; changes memory, not results")
    num_iterations: int = HfArg(default=1, help="optimizer updates per rollout; above 1 the clipping is at work")
    beta: float = HfArg(default=0.04, help="weight of the KL to the reference; 0 loads no reference")
    epsilon: float = HfArg(default=0.2, help="the probability ratio is clipped to 1 - epsilon .. 1 + epsilon")
    lr: float = HfArg(default=1e-6, help="AdamW's learning rate at the start, decaying linearly to 0")
    max_steps: int = HfArg(default=1000, help="steps, each one rollout of prompts_per_step x group_size completions")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in --output")
    keep_states: int = HfArg(default=1, help="newest checkpoints that a run can be resumed from; of older ones the model stays")
    save_every: int = HfArg(default=100, help="steps between checkpoints")
    seed: int = HfArg(default=42, help="of data order, sampling, new adapters and their dropout")
    freeze_audio_encoder: bool = HfArg(default=False, help="train the language model and the projector only")
    lora_rank: int = HfArg(default=0, help="train adapters of this rank (LoRA) in place of the weights; 0: train the weights")
    lora_alpha: float = HfArg(default=32.0, help="what the adapters add is multiplied by alpha / rank")
    lora_dropout: float = HfArg(default=0.0, help="dropout before the adapters; with it the policy that is scored is not quite the sampler")
    lora_target: str = HfArg(default="language", help="layers with adapters: language, all (the encoder's too), or a regular expression")
    merge: bool = HfArg(default=False, help="LoRA: also write the final model with its adapters merged, to merged in --output")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations in the backward pass: less memory")
    log_with: str = HfArg(default="", help="tensorboard or wandb, beside metrics.jsonl")


# ------------------------------------------------------------------------------------------- 1. a group of samples


def draw(logits: torch.Tensor, u: torch.Tensor, temperature: float) -> torch.Tensor:
    """Tokens (B, G) of logits (B, G, V): the first at which the cumulative probability reaches u (B, G) in (0, 1]."""
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # mps has none; fp32 sums of 156k terms err
    cdf = torch.softmax(logits / temperature, dim=-1, dtype=dtype).cumsum(-1)
    return torch.searchsorted(cdf, u[..., None] * cdf[..., -1:])[..., 0]  # times the last: the sum is not exactly 1


def sampling_noise(seed: int, k: int, G: int, T: int) -> torch.Tensor:
    """Uniform numbers (G, T) in (0, 1] for the k-th prompt of a run; 1: a stream apart from that of the data's order."""
    return 1 - torch.from_numpy(np.random.default_rng((seed, k, 1)).random((G, T), np.float32))


class SamplingCache(DynamicCache):
    """A KV cache with its keys in the type of its values: under autocast rotary embeddings return fp32, twice the size."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(values.dtype), values, *args, **kwargs)


@torch.no_grad()
def sample(model, inputs: dict, eos_ids: list[int], max_new_tokens: int, temperature=1.0, noise=None):
    """Completions of B prompts: ids (B, G, T), mask (B, G, T) True up to and including the first EOS.

    noise: uniform numbers in (0, 1], (B, G, max_new_tokens), one for each token, so that a sample depends on its own
    numbers alone and not on batch or process; None: greedy, G = 1.
    The prompt's KV cache is there once: its G completions are decoded in one row, each blind to the others.
    """
    prompt_mask = inputs["attention_mask"]
    B, G = len(prompt_mask), 1 if noise is None else noise.shape[1]
    eos = torch.tensor(eos_ids, device=prompt_mask.device)
    cache = SamplingCache(config=model.config.text_config)
    lm = partial(model.model.language_model, past_key_values=cache, use_cache=True)
    embeds, position = embed_prompt(model, inputs), prompt_positions(prompt_mask)
    hidden = lm(inputs_embeds=embeds, attention_mask=prompt_mask, position_ids=position).last_hidden_state
    hidden = hidden[:, -1:].expand(-1, G, -1)  # (B, G, D)
    # each round adds G columns, a token of every completion, of which a completion sees its own
    visible = prompt_mask.bool()[:, None, None].expand(-1, -1, G, -1)  # (B, 1, G, P + G rounds)
    own = torch.eye(G, dtype=torch.bool, device=visible.device).expand(B, 1, G, G)
    first_position = prompt_mask.sum(1, keepdim=True).expand(-1, G)  # (B, G)
    done, tokens = torch.zeros_like(first_position, dtype=torch.bool), []
    while True:
        logits = model.lm_head(hidden).float()  # (B, G, V)
        token = logits.argmax(-1) if noise is None else draw(logits, noise[..., len(tokens)], temperature)
        tokens.append(token)
        done |= torch.isin(token, eos)
        if len(tokens) == max_new_tokens or done.all():
            break
        visible = torch.cat([visible, own], -1)
        embeds, position = model.get_input_embeddings()(token), first_position + len(tokens) - 1
        hidden = lm(inputs_embeds=embeds, attention_mask=visible, position_ids=position).last_hidden_state
    ids = torch.stack(tokens, -1)  # (B, G, T)
    return ids, completion_mask(ids, eos_ids)


# ------------------------------------------------------------------------------------------------- 2. advantages


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A (B, G) = (r - mean) / (std + 1e-4) within each group; std with G - 1, as TRL and R1-AQA."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


# ---------------------------------------------------------------------- 3. log-probs, the prompt computed once a group


def shared_prompt_logps(model, inputs: dict, ids: torch.Tensor, mask: torch.Tensor, temperature: float):
    """Log-probs (B, G, T), fp32, of completions ids (B, G, T) under softmax(logits / temperature); 0 where mask is False.

    One row per prompt: [prompt, o_1, ..., o_G], without the filler behind their ends. A completion sees the prompt and
    itself, and its positions go on from the prompt's, so each token sees what it would see in a row of its own:

        prompt p1 p2, o_1 = a1 a2, o_2 = b1      position 0 1 2 3 2      b1 sees p1 p2 b1
    """
    (B, G, T), P = ids.shape, inputs["attention_mask"].shape[1]
    prompt_mask, mask = inputs["attention_mask"].bool(), mask.flatten(1)  # (B, P), (B, G*T)
    # places in G*T, those of real tokens first: the N columns after the prompt. G 2, T 3, mask 110 100: places 0 1 3
    packed = (~mask).long().argsort(dim=1, stable=True)[:, : mask.sum(1).max()]  # (B, N)
    real = mask.gather(1, packed)
    completion, t = packed // T, packed % T
    tokens = ids.flatten(1).gather(1, packed)

    # segment: 0 the prompt, 1..G the completions, -1 padding, which sees itself and is seen by no other
    segment = torch.cat([prompt_mask.long() - 1, torch.where(real, completion + 1, -1)], 1)  # (B, P+N)
    position = torch.cat([prompt_positions(prompt_mask), prompt_mask.sum(1, keepdim=True) + t], 1)
    query, key = segment[:, :, None], segment[:, None, :]
    # seen: the prompt and one's own completion, up to one's own position
    visible = ((key == 0) | (key == query)) & (position[:, None, :] <= position[:, :, None])  # (B, P+N, P+N)

    # completions are embedded as plain tokens: a placeholder drawn by chance must not take audio
    embeds = torch.cat([embed_prompt(model, inputs), model.get_input_embeddings()(tokens)], 1)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=visible[:, None], position_ids=position, use_cache=False
    ).last_hidden_state  # (B, P+N, D)

    # a token is predicted one column before its own; the first of every completion by the prompt's last
    previous = torch.arange(P, P + packed.shape[1], device=ids.device) - 1
    predictor = torch.where(t == 0, P - 1, previous)  # (B, N)
    hidden = hidden.gather(1, predictor[..., None].expand(-1, -1, hidden.shape[-1]))[real]  # (all real tokens, D)
    logits = model.lm_head(hidden).float() / temperature
    logp = logits.gather(1, tokens[real][:, None])[:, 0] - logits.logsumexp(-1)
    return logp.new_zeros(B, G * T).masked_scatter(mask, logp).view(B, G, T)


class Policy(nn.Module):
    """The model as accelerate wraps it. Only a call of the wrapped module synchronises gradients between processes."""

    _no_split_modules = ["Qwen2DecoderLayer", "Qwen2AudioEncoderLayer"]  # what FSDP2 gathers and frees one by one

    def __init__(self, model, temperature: float = 1.0):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, inputs, ids, mask):
        return shared_prompt_logps(self.model, inputs, ids, mask, self.temperature)

    def call(self, function):
        """Any other use of the model, such as sampling, through the module that FSDP2 wraps: see `with_whole_weights`."""
        return function()


# --------------------------------------------------------------------------------------------------- 4. the loss


def grpo_loss(logp, old_logp, ref_logp, advantages, mask, epsilon: float, beta: float):
    """The loss and, for the eye, the KL and the share of clipped tokens: three scalars, means over completions.

    logp, old_logp, ref_logp, mask: (B, G, T); advantages: (B, G); ref_logp may be None where beta is 0.
    L = - mean_i 1/|o_i| sum_t [min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta kl]    arXiv 2402.03300, eq. 3
    rho = exp(logp - old_logp)                                                              i: over G, and here over B
    kl = exp(ref - logp) - (ref - logp) - 1                                                 its eq. 4 (k3)
    """
    rho, A = torch.exp(logp - old_logp), advantages[..., None]
    unclipped, clipped = rho * A, rho.clamp(1 - epsilon, 1 + epsilon) * A
    log_ratio = torch.zeros_like(logp) if ref_logp is None else ref_logp - logp
    kl = torch.exp(log_ratio) - log_ratio - 1

    def mean(x):  # over the tokens of a completion, then over completions
        return ((x * mask).sum(-1) / mask.sum(-1)).mean()

    return -mean(torch.min(unclipped, clipped) - beta * kl), mean(kl.detach()), mean((clipped < unclipped).float())


def now() -> float:
    """Seconds, after the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# -------------------------------------------------------------------------------------------------------- the loop


def train(config: Config) -> None:
    from evaluate import eval_accuracy  # here, for evaluate.py imports the sampler from this file

    check_at_least(config, group_size=2, num_iterations=1, max_steps=1, beta=0, epsilon=0)
    if config.temperature <= 0:
        raise BadInput(f"--temperature must be above 0, not {config.temperature}")
    accelerator, examples, eval_examples = start(config)
    device = accelerator.device

    model, processor, adapters = load_policy(config, accelerator)
    own_reference = config.beta > 0 and adapters is None  # under LoRA it is the policy with its adapters off
    check_memory(accelerator, model, config, config.group_size * config.max_new_tokens, own_reference)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr, weight_decay=0.0)
    policy, optimizer = prepare(accelerator, Policy(model, config.temperature), optimizer)
    reference = policy if config.beta > 0 else None
    if own_reference:
        reference = prepare_frozen(accelerator, Policy(load_frozen(config, accelerator)[0], config.temperature))
    first_step = resume(accelerator, policy, optimizer, config)
    eos_ids = eos_tokens(model, processor)
    encoder_is_frozen = not any(p.requires_grad for p in model.model.audio_tower.parameters())

    B = config.prompts_per_step // accelerator.num_processes  # prompts of this process
    G, T = config.group_size, config.max_new_tokens
    micro_batches = [slice(i, i + config.micro_batch) for i in range(0, B, config.micro_batch)]
    steps, interrupted = range(first_step, config.max_steps), Interrupted()
    data = batches(accelerator, processor, examples, config, steps)
    seconds_logging = 0.0  # of the step before
    bar = tqdm(steps, "GRPO", config.max_steps, initial=first_step, disable=not accelerator.is_main_process)
    for step in bar:
        metrics = {}
        if eval_examples and step % config.eval_every == 0:
            metrics["eval_accuracy"] = eval_accuracy(accelerator, policy, processor, eval_examples, config)

        # 1. a group of completions for each prompt
        clock = {"began": now()}
        first, batch, inputs, clips = next(data)
        # the numbers behind a sample belong to its prompt, so that processes and batches change nothing
        noise = [sampling_noise(config.seed, k, G, T) for k in range(first, first + B)]
        noise = torch.stack(noise).to(device)  # (B, G, T)

        @torch.no_grad()
        def rollout():  # one encoding, by a frozen encoder, serves sampling, scoring and update
            heard = inputs | {"encoded_audio": encode_audio(model, inputs)} if encoder_is_frozen else inputs
            return heard, *sample(model, heard, eos_ids, T, config.temperature, noise)

        policy.eval()
        clock["ready"] = now()
        with accelerator.autocast():
            inputs, ids, mask = with_whole_weights(policy, rollout)
        clock["sampled"] = now()
        texts = decode(processor, eos_ids, ids, mask)

        # 2. rewards (B, G) and advantages
        accuracy = [[accuracy_reward(o, e.answer, config.prompt) for o in group] for group, e in zip(texts, batch)]
        well_formed = [[format_reward(o, config.prompt) for o in group] for group in texts]
        accuracy, well_formed = torch.tensor(accuracy), torch.tensor(well_formed)
        rewards = accuracy + well_formed
        advantages = group_advantages(rewards).to(device)
        clock["rewarded"] = now()

        # 3. the reference's log-probs
        ref_logp = [None] * len(micro_batches)
        if reference is not None:
            with torch.no_grad(), accelerator.autocast(), adapters.disable_adapter() if adapters else nullcontext():
                ref_logp = [reference(take(inputs, rows), ids[rows], mask[rows]) for rows in micro_batches]
        clock["scored"] = now()

        # 4. the policy's, the loss and the update; old_logp is what the first pass finds, before any update
        policy.train()
        for param_group in optimizer.param_groups:
            param_group["lr"] = config.lr * (1 - step / config.max_steps)
        old_logp, losses = [], []
        for iteration in range(config.num_iterations):
            for i, rows in enumerate(micro_batches):
                # FSDP2 would have to keep gradients whole to add them up before it sends them
                with nullcontext() if rows.stop == B or accelerator.is_fsdp2 else accelerator.no_sync(policy):
                    with accelerator.autocast():
                        logp = policy(take(inputs, rows), ids[rows], mask[rows])  # (micro_batch, G, T)
                    if iteration == 0:
                        old_logp.append(logp.detach())
                    loss, kl, clipped = grpo_loss(
                        logp, old_logp[i], ref_logp[i], advantages[rows], mask[rows], config.epsilon, config.beta
                    )
                    accelerator.backward(loss / len(micro_batches))  # and over processes, DDP takes the mean
                losses.append(torch.stack([loss.detach(), kl, clipped]))
            grad_norm = accelerator.clip_grad_norm_(policy.parameters(), 1.0)
            of_this_update = [loss for loss, _, _ in losses[-len(micro_batches) :]]
            check_finite(accelerator, step, of_this_update, grad_norm, [batch[rows] for rows in micro_batches])
            optimizer.step()
            optimizer.zero_grad()
        clock["updated"] = now()

        # what happened; every process has as many prompts, so the mean of the means is the mean
        loss, kl, clipped = torch.stack(losses).mean(0).tolist()
        spread, lengths = rewards.std(1), mask.sum(-1).float()
        unended = ~torch.isin(ids, torch.tensor(eos_ids, device=device)).any(-1)
        metrics |= {
            "reward": rewards.mean(),
            "reward_accuracy": accuracy.mean(),
            "reward_format": well_formed.mean(),
            "reward_std": spread.mean(),
            "zero_std_groups": (spread == 0).float().mean(),
            "kl": kl,
            "clip_fraction": clipped,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": optimizer.param_groups[0]["lr"],
            "completion_tokens": lengths.mean(),
            "truncated": unended.float().mean(),
            "unique_completions": np.mean([len(set(group)) for group in texts]),
            **clips,
            "seconds_sample": clock["sampled"] - clock["ready"],
            "seconds_score": clock["scored"] - clock["rewarded"],
            "seconds_update": clock["updated"] - clock["scored"],
            "seconds_other": clock["ready"] - clock["began"] + clock["rewarded"] - clock["sampled"] + seconds_logging,
        }
        if config.prompt == "think":
            thoughts = processor.tokenizer([o.partition("<answer>")[0] for group in texts for o in group])["input_ids"]
            thinking = np.mean([len(thought) for thought in thoughts])
            metrics |= {"thinking_tokens": thinking, "answer_tokens": lengths.mean() - thinking}
        metrics = write_metrics(accelerator, config, step, metrics)
        bar.set_postfix_str(
            f"reward {metrics['reward']:.2f} accuracy {metrics['reward_accuracy']:.2f} KL {metrics['kl']:.3f} "
            f"{clock['updated'] - clock['began']:.2f} s/step"
        )
        if step % config.save_every == 0:
            show_group(accelerator, step, batch[0], texts[0], rewards[0], advantages[0])
        seconds_logging, done = now() - clock["updated"], step + 1
        if (signal := interrupted.anywhere(accelerator)) or done % config.save_every == 0:
            save_checkpoint(accelerator, done, policy, optimizer, model, processor, config, adapters)
        if signal:
            leave(accelerator, signal, done, config.max_steps)

    if eval_examples:
        after = eval_accuracy(accelerator, policy, processor, eval_examples, config)
        write_metrics(accelerator, config, config.max_steps, {"eval_accuracy": after})
        before = next((line["eval_accuracy"] for line in read_metrics(config.output) if "eval_accuracy" in line), after)
        accelerator.print(f"held-out accuracy: {before:.1%} at first, {after:.1%} after {config.max_steps} steps")
    save_final(accelerator, policy, model, processor, config, adapters)
    accelerator.print(f"the model is in {config.output}, its curves in {config.output}/metrics.jsonl")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def show_group(accelerator, step: int, example: Example, texts: list[str], rewards, advantages) -> None:
    """One prompt with its completions, for the eye."""
    lines = [f"step {step}: {example.question} {example.choices} -> {example.answer}"]
    lines += [f"  reward {r:.0f}  advantage {A:+.2f}  {o!r}" for o, r, A in zip(texts, rewards, advantages)]
    if accelerator.is_main_process:
        tqdm.write("\n".join(lines))


def main() -> None:
    argv = sys.argv[1:]
    if not argv:
        from toy import prepare_run  # a real run needs none of it

        argv = prepare_run(Accelerator())
    train(parse(Config, __doc__, argv))


if __name__ == "__main__":
    run(main)
