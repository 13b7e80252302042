"""Supervised fine-tuning, the baseline of R1-AQA (arXiv 2503.11197).

    accelerate launch --config_file fsdp.yaml train_sft.py \\
        --model Qwen/Qwen2-Audio-7B-Instruct --data avqa_train.jsonl --output runs/sft            # or: --lora_rank 16

The loss is the mean of -log pi(token | audio, prompt, tokens before) over all answer tokens of a step. The log-probs are
GRPO's, with a group of one: same prompts, same data order, same flags where they mean the same.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from checkpoints import resume, save_checkpoint, save_final
from data import BadInput, Example, take
from evaluate import eval_accuracy
from model import check_memory, load_policy
from train_grpo import Policy
from training import Interrupted, batches, check_finite, leave, parse, prepare, run, start, write_metrics


@dataclass
class Config:
    model: str = HfArg(default="Qwen/Qwen2-Audio-7B-Instruct", help="hub name or folder of a Qwen2-Audio model")
    data: str = HfArg(default="", help="training questions: JSON or JSON Lines, see README")
    audio_dir: str = HfArg(default="", help="folder of the clips; empty: beside the questions")
    skip_bad_audio: bool = HfArg(default=False, help="pass over clips that cannot be read, and count them, instead of stopping")
    eval_data: str = HfArg(default="", help="questions to measure accuracy on while training; empty: none")
    eval_every: int = HfArg(default=100, help="steps between two such measurements")
    output: str = HfArg(default="runs/sft", help="folder for metrics, checkpoints and the final model")
    prompt: str = HfArg(default="answer", help="plain or answer; there are no thoughts to imitate for think")
    max_new_tokens: int = HfArg(default=256, help="of an answer, when accuracy is measured")
    prompts_per_step: int = HfArg(default=16, help="examples per optimizer step, all processes together")
    micro_batch: int = HfArg(default=1, help="examples in one forward on one process; changes memory, not results")
    lr: float = HfArg(default=1e-5, help="AdamW's learning rate at the start, decaying linearly to 0")
    epochs: float = HfArg(default=1.0, help="passes over the data, where --max_steps does not say")
    max_steps: int = HfArg(default=0, help="optimizer steps; 0: as --epochs says")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in --output")
    keep_states: int = HfArg(default=1, help="newest checkpoints that a run can be resumed from; of older ones the model stays")
    save_every: int = HfArg(default=100, help="steps between checkpoints")
    seed: int = HfArg(default=42, help="of data order, new adapters and their dropout")
    freeze_audio_encoder: bool = HfArg(default=False, help="train the language model and the projector only")
    lora_rank: int = HfArg(default=0, help="train adapters of this rank (LoRA) in place of the weights; 0: train the weights")
    lora_alpha: float = HfArg(default=32.0, help="what the adapters add is multiplied by alpha / rank")
    lora_dropout: float = HfArg(default=0.0, help="dropout before the adapters")
    lora_target: str = HfArg(default="language", help="layers with adapters: language, all (the encoder's too), or a regular expression")
    merge: bool = HfArg(default=False, help="LoRA: also write the final model with its adapters merged, to merged in --output")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations in the backward pass: less memory")
    log_with: str = HfArg(default="", help="tensorboard or wandb, beside metrics.jsonl")


def answer_batch(processor, examples: list[Example], prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers as groups of one: ids and mask (B, 1, T), each ending as the chat template ends a turn."""
    target = "{}" if prompt == "plain" else "<answer>{}</answer>"
    texts = [target.format(example.answer) + "<|im_end|>" for example in examples]
    tokens = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return tokens["input_ids"][:, None], tokens["attention_mask"][:, None].bool()


def train(config: Config) -> None:
    if config.prompt == "think":
        raise BadInput("--prompt think: the data holds no thoughts to imitate; choose plain or answer")
    accelerator, examples, eval_examples = start(config)
    max_steps = config.max_steps or math.ceil(config.epochs * len(examples) / config.prompts_per_step)
    if max_steps < 1:
        raise BadInput("nothing to do: --max_steps or --epochs must be above 0")
    device = accelerator.device
    model, processor, adapters = load_policy(config, accelerator)
    check_memory(accelerator, model, config, completion_tokens=32, with_reference=False)  # an answer is short
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr, weight_decay=0.0)
    policy, optimizer = prepare(accelerator, Policy(model), optimizer)
    first_step = resume(accelerator, policy, optimizer, config)

    B = config.prompts_per_step // accelerator.num_processes  # examples of this process
    micro_batches = [slice(i, i + config.micro_batch) for i in range(0, B, config.micro_batch)]
    steps, interrupted = range(first_step, max_steps), Interrupted()
    data = batches(accelerator, processor, examples, config, steps)
    bar = tqdm(steps, "SFT", max_steps, initial=first_step, disable=not accelerator.is_main_process)
    for step in bar:
        metrics = {}
        if eval_examples and step % config.eval_every == 0:
            metrics["eval_accuracy"] = eval_accuracy(accelerator, policy, processor, eval_examples, config)

        began = time.perf_counter()
        _, batch, inputs, clips = next(data)
        ids, mask = (tensor.to(device) for tensor in answer_batch(processor, batch, config.prompt))
        n_tokens = accelerator.reduce(mask.sum(), "sum")  # answer tokens of the whole step

        policy.train()
        for param_group in optimizer.param_groups:
            param_group["lr"] = config.lr * (1 - step / max_steps)
        losses = []
        for rows in micro_batches:
            # FSDP2 would have to keep gradients whole to add them up before it sends them
            with nullcontext() if rows.stop == B or accelerator.is_fsdp2 else accelerator.no_sync(policy):
                with accelerator.autocast():
                    logp = policy(take(inputs, rows), ids[rows], mask[rows])  # (micro_batch, 1, T)
                # the mean over processes is taken of gradients, and the loss is a sum over all of them
                loss = -logp.sum() / n_tokens * accelerator.num_processes
                accelerator.backward(loss)
            losses.append(loss.detach())
        grad_norm = accelerator.clip_grad_norm_(policy.parameters(), 1.0)
        check_finite(accelerator, step, losses, grad_norm, [batch[rows] for rows in micro_batches])
        optimizer.step()
        optimizer.zero_grad()

        metrics |= {"loss": sum(losses), "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **clips}
        metrics |= {"tokens": n_tokens, "seconds": time.perf_counter() - began}
        done = step + 1
        metrics = write_metrics(accelerator, config, step, metrics)
        bar.set_postfix_str(f"loss {metrics['loss']:.3f} {metrics['seconds']:.2f} s/step")
        if (signal := interrupted.anywhere(accelerator)) or done % config.save_every == 0:
            save_checkpoint(accelerator, done, policy, optimizer, model, processor, config, adapters)
        if signal:
            leave(accelerator, signal, done, max_steps)

    if eval_examples:
        accuracy = eval_accuracy(accelerator, policy, processor, eval_examples, config)
        write_metrics(accelerator, config, max_steps, {"eval_accuracy": accuracy})
    save_final(accelerator, policy, model, processor, config, adapters)
    accelerator.print(f"the model is in {config.output}, its curves in {config.output}/metrics.jsonl")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run(lambda: train(parse(Config, __doc__)))
