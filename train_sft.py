"""Supervised fine-tuning, the baseline of R1-AQA (arXiv 2503.11197).

    accelerate launch train_sft.py                  # on the offline toy
    accelerate launch --config_file fsdp.yaml train_sft.py \\
        --model Qwen/Qwen2-Audio-7B-Instruct --data avqa_train.jsonl --output runs/sft    # or --lora_rank 16

The loss is the mean of -log pi(token | audio, prompt, tokens before) over all answer tokens of a step (of
thought and answer with `--prompt think`). The log-probs are GRPO's, with a group of one: same prompts, same
data order, same flags where they mean the same.
"""

import math
import sys
from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from data import BadInput, Example, select_rows
from evaluate import held_out_accuracy
from flags import TrainConfig, check_at_least, is_given, parse, run_main
from model import turn_end
from rewards import format_reward
from training import accumulate, finish, log, optimizer_step, policy_logps, setup, steps


@dataclass
class Config(TrainConfig):
    output: str = HfArg(default="runs/sft", help="folder for metrics, checkpoints and the final model")
    prompt: str = HfArg(default="answer", help="plain, answer, or think if each row has a thought to imitate")
    lr: float = HfArg(default=1e-5, help="AdamW's learning rate at the start, decaying linearly to 0")
    epochs: float = HfArg(default=1.0, help="passes over the data, if --max_steps is 0")
    max_steps: int = HfArg(default=0, help="steps of prompts_per_step examples; 0: as --epochs says")


def target_text(example: Example, prompt: str) -> str:
    """What is imitated: the answer, in its block unless the prompt is plain; for `think` after a thought."""
    answer = example.answer if prompt == "plain" else f"<answer>{example.answer}</answer>"
    return f"<think>{example.thought}</think>{answer}" if prompt == "think" else answer


def answer_batch(processor, examples: list[Example], prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets as groups of one: ids and mask (B, 1, T), each ending as the chat template ends a turn."""
    texts = [target_text(example, prompt) for example in examples]
    targets = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    targets = [torch.tensor([*target, turn_end(processor)]) for target in targets]
    ids = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1)  # (B, T)
    return ids.clamp_min(0)[:, None], (ids >= 0)[:, None]


def train(config: Config) -> None:
    check_at_least(config, max_steps=0)
    if config.max_steps == 0 and config.epochs <= 0:
        raise BadInput("nothing to do: --max_steps or --epochs must be above 0")
    run = setup(config)
    for example in run.examples:
        if config.prompt == "think" and not format_reward(target_text(example, "think"), "think"):
            raise BadInput(f"{example.location}: no thought to imitate (key 'thought', text without tags)")
    run.max_steps = config.max_steps or math.ceil(config.epochs * len(run.examples) / config.prompts_per_step)
    for step, batch in steps(run, held_out_accuracy):
        answers = answer_batch(run.processor, batch.examples, config.prompt)
        ids, mask = (tensor.to(run.accelerator.device) for tensor in answers)  # (B, 1, T)
        n_tokens = run.accelerator.reduce(mask.sum(), "sum")  # answer tokens of the whole step

        losses = []
        for rows in run.micro_batches:
            with accumulate(run, rows):
                logps = policy_logps(run, select_rows(batch.inputs, rows), ids[rows], mask[rows])
                # DDP takes the mean of gradients over processes; the loss is a sum over all of them
                loss = -logps.sum() / n_tokens * run.accelerator.num_processes
                run.accelerator.backward(loss)
            losses.append(loss.detach())
        grad_norm = optimizer_step(run, step, batch, losses)
        metrics = {"loss": sum(losses), "grad_norm": grad_norm, "tokens": n_tokens}
        log(run, metrics, shown=("loss",))
    finish(run, held_out_accuracy)


def main() -> None:
    config = parse(Config, __doc__)
    if not is_given("--model", "--data"):
        from toy import toy_flags  # neither flag is given: the offline toy

        config = parse(Config, __doc__, toy_flags("sft", config) + sys.argv[1:])
    train(config)


if __name__ == "__main__":
    run_main(main)
