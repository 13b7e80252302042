"""Supervised fine-tuning, the baseline of R1-AQA (arXiv 2503.11197).

    accelerate launch train_sft.py                  # on the offline toy
    accelerate launch --config_file fsdp.yaml train_sft.py \\
        --model Qwen/Qwen2-Audio-7B-Instruct --data avqa_train.jsonl --output runs/sft    # or --lora_rank 16

The loss is the mean of -log pi(token | audio, prompt, previous tokens) over all answer tokens of a step
(thought and answer tokens with `--prompt think`). Log-probs are computed as in GRPO, with groups of one.
Prompts and data order are the same too, and so are the flags that mean the same thing.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers.hf_argparser import HfArg

from checkpoints import save_checkpoint, save_final
from cli import BadInput, check_at_least, is_given, parse, progress_bar, run_main
from data import Example, select_rows
from evaluate import log_held_out_accuracy
from model import end_of_turn
from rewards import format_reward
from training import TrainConfig, announce, check_update, end_run, learning_rate, log_metrics
from training import mean_over_processes, now, read_batches, setup, stop_together


@dataclass
class Config(TrainConfig):
    output: str = HfArg(default="runs/sft", help="folder for metrics, checkpoints and the final model")
    prompt: str = HfArg(default="answer", help="plain or answer; think if each row has a thought to imitate")
    lr: float = HfArg(default=1e-5, help="initial AdamW learning rate, decays linearly to 0")
    epochs: float = HfArg(default=1.0, help="passes over the data, if --max_steps is 0")
    max_steps: int = HfArg(default=0, help="steps of prompts_per_step examples; 0: set by --epochs")


def target_text(example: Example, prompt: str) -> str:
    """Text to imitate: the answer, in a block unless the prompt is plain; with `think`, after the thought."""
    if prompt == "plain":
        return example.answer
    block = f"<answer>{example.answer}</answer>"
    return f"<think>{example.thought}</think>{block}" if prompt == "think" else block


def make_targets(processor, examples: list[Example], prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets as groups of one: ids and mask (B, 1, T), each ending with the template's end-of-turn token."""
    texts = [target_text(example, prompt) for example in examples]
    tokenized = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    targets = [torch.tensor([*tokens, end_of_turn(processor)]) for tokens in tokenized]
    ids = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1)  # (B, T)
    mask = ids >= 0
    return ids.clamp_min(0)[:, None], mask[:, None]


def train(config: Config) -> None:
    check_at_least(config, max_steps=0)
    if config.max_steps == 0 and config.epochs <= 0:
        raise BadInput("nothing to do: --max_steps or --epochs must be above 0")
    run = setup(config)
    for example in run.examples:
        if config.prompt == "think" and not format_reward(target_text(example, "think"), "think"):
            raise BadInput(f"{example.location}: no thought to imitate (key 'thought', text without tags)")
    run.max_steps = config.max_steps or math.ceil(config.epochs * len(run.examples) / config.prompts_per_step)
    accelerator = run.accelerator
    device = accelerator.device
    batches = read_batches(run)
    progress = progress_bar(
        initial=run.first_step, total=run.max_steps, disable=not accelerator.is_main_process
    )

    for step in range(run.first_step, run.max_steps + 1):
        is_last = step == run.max_steps  # the final pass only saves and evaluates

        # Periodic work: checkpoint, evaluate.
        # stop_together: if any process fails or is told to stop inside the block, all save a checkpoint and
        # stop; without it the others would wait forever
        if step > run.first_step and step % config.save_every == 0:
            save_checkpoint(run, step)
        if run.eval_examples and (is_last or step % config.eval_every == 0):
            with stop_together(run, step):
                log_held_out_accuracy(run, step)
        if is_last:
            break

        started = now()
        with stop_together(run, step):
            batch = next(batches)  # this process's B examples
        if step in config.skip_steps:
            announce(run, f"step {step}: skipped (listed in --skip_steps)")
            progress.update()
            continue
        targets = make_targets(run.processor, batch.examples, config.prompt)
        ids, mask = (tensor.to(device) for tensor in targets)  # (B, 1, T)
        n_tokens = accelerator.reduce(mask.sum(), "sum")  # answer tokens of the step, over all processes

        for param_group in run.optimizer.param_groups:
            param_group["lr"] = learning_rate(run, step)
        torch.manual_seed(config.seed + batch.first)  # so that a resumed run draws the same LoRA dropout
        run.policy.train()
        losses = []
        for rows in run.micro_batches:
            # DDP synchronizes gradients in the last micro-batch only. FSDP2 does so in every one;
            # otherwise it would have to keep full, unsharded gradients
            sync_gradients = rows == run.micro_batches[-1] or accelerator.is_fsdp2
            with nullcontext() if sync_gradients else accelerator.no_sync(run.policy):
                with accelerator.autocast():
                    logps, _ = run.policy(select_rows(batch.inputs, rows), ids[rows], mask[rows])
                # DDP averages the gradients over processes, but this loss is a sum over all of them
                loss = -logps.sum() / n_tokens * accelerator.num_processes
                accelerator.backward(loss)
            losses.append(loss.detach())
        # clips in place and returns the norm from before clipping
        grad_norm = float(accelerator.clip_grad_norm_(run.policy.parameters(), 1.0))
        with stop_together(run, step):
            check_update(run, step, batch, losses, grad_norm)
        run.optimizer.step()
        # DDP's gradients are views into its buckets; setting them to None would allocate them again
        run.optimizer.zero_grad(set_to_none=not isinstance(run.policy, DistributedDataParallel))
        updated = now()

        metrics = {
            "loss": sum(losses),
            "grad_norm": grad_norm,
            "tokens": n_tokens,
            "lr": run.optimizer.param_groups[0]["lr"],
            **batch.metrics,  # clips that were cut or skipped
            "seconds_update": updated - started,
        }
        if device.type == "cuda":
            metrics["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9  # the peak so far
        metrics = mean_over_processes(run, metrics)
        with stop_together(run, step + 1):
            log_metrics(run, step, metrics)
        progress.set_postfix({"loss": f"{metrics['loss']:.3g}"})
        progress.update()

    progress.close()
    save_final(run)
    accelerator.print(f"model saved to {config.output}; for a report: python -m tools.report {config.output}")
    end_run(run)


def main() -> None:
    config = parse(Config, __doc__)
    if not is_given("--model", "--data"):
        from toy import toy_flags  # neither flag is given: the offline toy

        config = parse(Config, __doc__, toy_flags("sft", config))
    train(config)


if __name__ == "__main__":
    run_main(main)
