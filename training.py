"""Everything of a training run but the algorithm: settings, setup, the loop over steps, several processes.

A script gets a run from `setup`, loops over `steps`, and ends with `finish`; what happens in a step is in
`train_grpo.py` and `train_sft.py`.
"""

import os
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from checkpoints import read_metrics, resume, save_checkpoint, save_final, write_metrics
from data import PROMPTS, BadInput, Batch, Example, check_audio, load_examples, make_folder, read_batch
from data import select_rows
from flags import check_at_least
from model import (
    DEFAULT_MODEL,
    Policy,
    check_memory,
    encode_audio,
    eos_tokens,
    load_frozen,
    load_policy,
    sample,
)
from model import sampling_noise

# ---------------------------------------------------------------- settings


@dataclass
class TrainConfig:
    """What both kinds of training have in common."""

    model: str = HfArg(default=DEFAULT_MODEL, help="hub name or folder of a Qwen2-Audio model")
    data: str = HfArg(default="", help="training questions: JSON or JSON Lines, see README")
    audio_dir: str = HfArg(default="", help="folder of the clips; empty: beside the questions")
    skip_bad_audio: bool = HfArg(
        default=False, help="skip clips that cannot be read and count them; else stop"
    )
    eval_data: str = HfArg(default="", help="questions to measure accuracy on while training; empty: none")
    eval_every: int = HfArg(default=100, help="steps between two such measurements")
    output: str = HfArg(default="runs/train", help="folder for metrics, checkpoints and the final model")
    prompt: str = HfArg(default="answer", help="plain, answer or think: prompt, format reward and extraction")
    max_new_tokens: int = HfArg(default=256, help="a completion without an end by then is cut and counted")
    prompts_per_step: int = HfArg(default=16, help="prompts per step, all processes together")
    micro_batch: int = HfArg(default=1, help="prompts in one forward of one process; results stay the same")
    lr: float = HfArg(default=1e-6, help="AdamW's learning rate at the start, decaying linearly to 0")
    max_steps: int = HfArg(default=1000, help="steps of prompts_per_step prompts")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in --output")
    save_every: int = HfArg(
        default=100, help="steps between checkpoints, and between groups that are printed"
    )
    keep_states: int = HfArg(
        default=1, help="newest checkpoints that stay resumable; of others the model stays"
    )
    seed: int = HfArg(default=42, help="seeds data order, sampling, new adapters and their dropout")
    freeze_audio_encoder: bool = HfArg(default=False, help="train the language model and the projector only")
    lora_rank: int = HfArg(default=0, help="train adapters of this rank (LoRA); 0: train the weights")
    lora_alpha: float = HfArg(default=32.0, help="the adapters' output is multiplied by alpha / rank")
    lora_dropout: float = HfArg(
        default=0.0, help="before the adapters; then the sampler is not quite the policy"
    )
    lora_target: str = HfArg(default="language", help="layers: language, all (the encoder's too), or a regex")
    merge: bool = HfArg(default=False, help="LoRA: also write the merged final model, to merged in --output")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, more time")
    log_with: str = HfArg(default="", help="tensorboard or wandb, beside metrics.jsonl")


def check_settings(config: TrainConfig, processes: int) -> None:
    """Raise BadInput for settings that no training can have."""
    if config.prompt not in PROMPTS:
        raise BadInput(f"--prompt {config.prompt}: unknown, choose one of {', '.join(PROMPTS)}")
    if not config.data:
        raise BadInput("--data is missing: the file of training questions")
    check_at_least(config, prompts_per_step=1, micro_batch=1, save_every=1, eval_every=1, max_new_tokens=1)
    check_at_least(config, lr=0, seed=0, lora_rank=0, lora_alpha=0, keep_states=1)
    if not 0 <= config.lora_dropout < 1:
        raise BadInput(f"--lora_dropout must be from 0 to below 1, not {config.lora_dropout}")
    if config.merge and not config.lora_rank:
        raise BadInput("--merge is for LoRA, and --lora_rank is 0: there are no adapters to merge")
    if config.freeze_audio_encoder and config.lora_rank and config.lora_target != "language":
        raise BadInput("--freeze_audio_encoder is for training without LoRA; see --lora_target")
    if config.prompts_per_step % (processes * config.micro_batch):
        share = f"{processes} process(es) x --micro_batch {config.micro_batch}"
        raise BadInput(f"--prompts_per_step {config.prompts_per_step} is not a multiple of {share}")


# ---------------------------------------------------------------- a run


@dataclass
class Run:
    """The parts of a training run."""

    config: TrainConfig
    accelerator: Accelerator
    examples: list[Example]
    eval_examples: list[Example]
    model: nn.Module
    processor: object
    adapters: object  # peft's view of the model; None without LoRA
    max_steps: int
    policy: nn.Module = None  # a Policy around the model, as accelerate wraps it
    reference: nn.Module = None  # another; under LoRA the policy itself; None without KL
    optimizer: torch.optim.Optimizer = None
    eos_ids: list[int] = None
    first_step: int = 0
    bar: tqdm = None
    metrics: dict = field(default_factory=dict)  # of the current step
    seconds: dict = field(default_factory=lambda: defaultdict(float))  # of the current step, by phase
    last_lap: float = 0.0

    @property
    def prompts(self) -> int:
        """Prompts of a step on this process."""
        return self.config.prompts_per_step // self.accelerator.num_processes

    @property
    def micro_batches(self) -> list[slice]:
        """The rows of a batch that go through one forward together."""
        size = self.config.micro_batch
        return [slice(i, i + size) for i in range(0, self.prompts, size)]


def setup(config: TrainConfig, temperature: float = 1.0, with_reference: bool = False) -> Run:
    """Check all that can be checked, read the questions, load the models, resume."""
    accelerator = make_accelerator(config)
    check_settings(config, accelerator.num_processes)
    questions = load_questions(config, accelerator)
    make_output(config, accelerator)
    run = Run(config, accelerator, *questions, *load_policy(config, accelerator), config.max_steps)
    run.eos_ids = eos_tokens(run.model, run.processor)
    separate_reference = with_reference and not run.adapters
    check_memory(accelerator, run.model, separate_reference)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
    run.policy, run.optimizer = accelerator.prepare(Policy(run.model, temperature), optimizer)
    register_fsdp_forward_method(run.policy, "call")  # for with_whole_weights; nothing without FSDP2
    run.reference = run.policy if with_reference else None  # under LoRA, with its adapters off
    if separate_reference:
        reference = Policy(load_frozen(config, accelerator)[0], temperature)
        if accelerator.is_fsdp2:  # accelerate's own prepare takes only one model
            run.reference = fsdp2_prepare_model(accelerator, reference)
        else:
            run.reference = reference.to(accelerator.device)
    run.first_step = resume(run)
    return run


def make_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's view of the processes as they were launched; refuses kinds that are not supported."""
    if config.log_with not in ("", "tensorboard", "wandb"):
        raise BadInput(f"--log_with {config.log_with}: unknown, choose tensorboard or wandb")
    # not PartialState(), which overlooks ACCELERATE_USE_CPU and finds one process where there are several
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # else DDP holds every gradient twice
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # one process saves, the others wait
    kinds = dict(log_with=config.log_with or None, project_dir=config.output)
    try:
        accelerator = Accelerator(**kinds, kwargs_handlers=[views, patience])
    except ValueError as error:
        raise BadInput(f"accelerate: {error}") from None
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise BadInput(f"--mixed_precision {accelerator.mixed_precision}: not supported, choose bf16 or no")
    if accelerator.is_fsdp2:
        if accelerator.mixed_precision == "bf16":  # accelerate's own would return log-probs in bf16
            precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            accelerator.state.fsdp_plugin.mixed_precision_policy = precision
    elif (kind := accelerator.distributed_type) not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise BadInput(f"{kind}: not supported; plain processes and FSDP2 are (fsdp.yaml)")
    if accelerator.device.type == "cuda" and accelerator.mixed_precision == "no":
        accelerator.print("computing in fp32; `accelerate launch --mixed_precision bf16` is much faster")
    return accelerator


def load_questions(config: TrainConfig, accelerator: Accelerator) -> tuple[list[Example], list[Example]]:
    """Questions to train on and held-out ones, and whether their clips are there."""
    examples = load_examples(config.data, config.audio_dir)
    eval_examples = load_examples(config.eval_data, config.audio_dir) if config.eval_data else []
    missing = check_audio(examples, config.skip_bad_audio)
    missing_eval = check_audio(eval_examples, config.skip_bad_audio)
    if missing or missing_eval:
        parts = f"{missing} for training (the next row is used), {missing_eval} held out (counted as wrong)"
        accelerator.print(f"clips missing: {parts}")
    return examples, eval_examples


def make_output(config: TrainConfig, accelerator: Accelerator) -> None:
    """Make the output folder and start the trackers. Raises BadInput if the folder holds something."""
    output = config.output
    if not config.resume and os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
        ways = "--resume, remove it, or name another folder"
        raise BadInput(f"--output {output}: already holds a run or other files; {ways}")
    accelerator.wait_for_everyone()  # until all have seen the folder empty
    if accelerator.is_main_process:
        make_folder(output)
    accelerator.init_trackers("r1-aqa", asdict(config))
    if config.log_with and accelerator.is_main_process and not accelerator.trackers:
        raise BadInput(f"--log_with {config.log_with}: not installed, pip install {config.log_with}")


# ---------------------------------------------------------------- batches


def batches(run: Run) -> Iterator[Batch]:
    """This process's batch for each step. A thread makes the next one while this one is computed on."""
    config, accelerator = run.config, run.accelerator
    processor = deepcopy(run.processor)  # a tokenizer is not to be used by two threads at once
    jobs = deque()

    def ready(job) -> Batch:
        batch = job.result()
        batch.inputs = {name: value.to(accelerator.device) for name, value in batch.inputs.items()}
        torch.manual_seed(config.seed + batch.first)  # for LoRA's dropout: a resumed run draws the same
        return batch

    with ThreadPoolExecutor(1) as thread:
        for step in range(run.first_step, run.max_steps):
            first = step * config.prompts_per_step + accelerator.process_index * run.prompts
            jobs.append(thread.submit(read_batch, processor, run.examples, config, first, run.prompts))
            if len(jobs) == 2:
                yield ready(jobs.popleft())
        yield ready(jobs.popleft())


# ---------------------------------------------------------------- what a step is made of


def steps(run: Run, accuracy: Callable[[Run], float]) -> Iterator[tuple[int, Batch]]:
    """Each step with its batch.

    Before each step it evaluates, if due, and sets the learning rate. After each step it saves a checkpoint,
    if due or if a signal came; after a signal it then exits with the signal's status.
    """
    config, accelerator, interrupted, data = run.config, run.accelerator, Interrupted(), batches(run)
    step_numbers = range(run.first_step, run.max_steps)
    silent = not accelerator.is_main_process
    run.bar = tqdm(step_numbers, total=run.max_steps, initial=run.first_step, disable=silent)
    run.last_lap = now()
    for step in run.bar:
        if run.eval_examples and step % config.eval_every == 0:
            run.metrics["eval_accuracy"] = accuracy(run)
            lap(run, "eval")
        for group in run.optimizer.param_groups:
            group["lr"] = config.lr * (1 - step / run.max_steps)
        batch = next(data)
        run.metrics |= batch.metrics
        lap(run, "other")
        yield step, batch
        lap(run, "other")
        signal_number = interrupted.on_any_process(accelerator)
        if signal_number or (step + 1) % config.save_every == 0:
            save_checkpoint(run, step + 1)
            lap(run, "save")
        if signal_number:
            done = f"{step + 1} of {run.max_steps} steps"
            accelerator.print(f"stopped after {done}; the same command with --resume goes on")
            end(run, 128 + signal_number)


def generate(run: Run, batch: Batch, group_size: int, temperature: float):
    """A group of completions for each prompt of the batch: ids and mask (B, G, T).

    A frozen encoder runs here, once: its output joins batch.inputs, for scoring and update.
    """
    shape = group_size, run.config.max_new_tokens
    # random numbers are tied to the prompt: neither processes nor batches change a sample
    noise = [sampling_noise(run.config.seed, batch.first + b, *shape) for b in range(run.prompts)]
    noise = torch.stack(noise).to(run.accelerator.device)  # (B, G, T)

    @torch.no_grad()
    def encode_and_sample():
        if not any(p.requires_grad for p in run.model.model.audio_tower.parameters()):
            batch.inputs["encoded_audio"] = encode_audio(run.model, batch.inputs)
        return sample(run.model, batch.inputs, run.eos_ids, shape[1], temperature, noise)

    run.policy.eval()
    with run.accelerator.autocast():
        ids, mask = with_whole_weights(run.policy, encode_and_sample)
    lap(run, "sample")
    return ids, mask


def reference_logps(run: Run, batch: Batch, ids: torch.Tensor, mask: torch.Tensor) -> list:
    """Log-probs (micro_batch, G, T) under the reference for each micro-batch; None without a reference.

    Under LoRA the reference is the policy with its adapters off.
    """
    lap(run, "other")
    logps = [None] * len(run.micro_batches)
    if run.reference:
        adapters_off = run.adapters.disable_adapter() if run.adapters else nullcontext()
        parts = [(select_rows(batch.inputs, rows), ids[rows], mask[rows]) for rows in run.micro_batches]
        with torch.no_grad(), run.accelerator.autocast(), adapters_off:
            logps = [run.reference(*part) for part in parts]
    lap(run, "score")
    return logps


def policy_logps(run: Run, inputs: dict, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probs (B, G, T) under the policy, with gradients."""
    run.policy.train()
    with run.accelerator.autocast():
        return run.policy(inputs, ids, mask)


def accumulate(run: Run, rows: slice):
    """Context manager of a micro-batch: DDP exchanges gradients between processes in the last one only."""
    # FSDP2 exchanges them every time: waiting would mean to hold unsharded gradients
    if rows.stop == run.prompts or run.accelerator.is_fsdp2:
        return nullcontext()
    return run.accelerator.no_sync(run.policy)


def optimizer_step(run: Run, step: int, batch: Batch, losses: list[torch.Tensor]) -> float:
    """Clip the gradient to norm 1 and update; returns the norm before.

    losses: a tensor for each micro-batch. Raises BadInput, before the update, if anything is not finite.
    """
    grad_norm = float(run.accelerator.clip_grad_norm_(run.policy.parameters(), 1.0))
    check_finite(run, step, batch, losses, grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    lap(run, "update")
    return grad_norm


def check_finite(run: Run, step: int, batch: Batch, losses: list[torch.Tensor], grad_norm: float) -> None:
    """Raise BadInput, naming the examples, if a loss or the gradient is not finite on any process."""
    # one entry for each micro-batch, then the gradient's
    finite = torch.stack([loss.isfinite().all() for loss in [*losses, losses[0].new_tensor(grad_norm)]])
    if run.accelerator.gather(finite.all()[None]).all():
        return
    parts = [batch.examples[rows] for rows in run.micro_batches]
    bad = gather_object([e.location for ok, part in zip(finite, parts) if not ok for e in part])
    what = "loss" if bad else "gradient"
    bad = bad or gather_object([example.location for example in batch.examples])
    what = f"the {what} is not finite (the gradient's norm is {grad_norm}); this update was not made"
    raise BadInput(f"step {step}: {what}. Examples: {', '.join(bad)}")


def log(run: Run, step: int, metrics: dict, shown: tuple[str, ...]) -> None:
    """Write the metrics of a step, means over processes; those to be shown go to the bar too."""
    seconds = {f"seconds_{phase}": value for phase, value in run.seconds.items()}
    metrics = run.metrics | metrics | {"lr": run.optimizer.param_groups[0]["lr"]} | seconds
    metrics = write_metrics(run, step, metrics)
    total = round(sum(run.seconds.values()), 2)
    run.bar.set_postfix({name: metrics[name] for name in shown} | {"seconds": total})
    run.metrics = {}
    run.seconds.clear()


def finish(run: Run, accuracy: Callable[[Run], float]) -> None:
    """Measure the final model, save it, end."""
    output = run.config.output
    if run.eval_examples:
        after = accuracy(run)
        write_metrics(run, run.max_steps, {"eval_accuracy": after})
        measured = [line["eval_accuracy"] for line in read_metrics(output) if "eval_accuracy" in line]
        before = f"{[*measured, after][0]:.1%} at first"
        run.accelerator.print(f"held-out accuracy: {before}, {after:.1%} after {run.max_steps} steps")
    save_final(run)
    run.accelerator.print(f"the model is in {output}, its curves in {output}/metrics.jsonl")
    end(run)


def end(run: Run, status: int = 0) -> None:
    """Let every process finish what it does; without this gloo sometimes aborts at exit."""
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    if status:
        sys.exit(status)


# ---------------------------------------------------------------- time


def now() -> float:
    """Seconds, after the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def lap(run: Run, phase: str) -> None:
    """Count the time since the last lap as a phase of the step."""
    time_now = now()
    run.seconds[phase] += time_now - run.last_lap
    run.last_lap = time_now


class Interrupted:
    """Keeps the number of the first SIGTERM or Ctrl-C; a second one, 5 s later or more, exits at once."""

    def __init__(self):
        self.number, self.since = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.number and time.monotonic() - self.since > 5:  # launchers repeat the first to each process
            os._exit(128 + number)
        if not self.number:
            self.number, self.since = number, time.monotonic()
            os.write(2, b"\nfinishing this step and saving; again in 5 s or more to stop at once\n")

    def on_any_process(self, accelerator: Accelerator) -> int:
        """The signal's number if any process caught one, else 0: all must stop after the same step."""
        return int(accelerator.gather(torch.tensor([self.number], device=accelerator.device)).max())


def with_whole_weights(policy, function, *args):
    """function(*args), which may run the model as often as it likes on this process.

    Under FSDP2 each forward gathers weights from all processes, and in sampling they run unequal numbers of
    forwards: so all weights are gathered once, before, and freed after.
    """
    shards = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    if not shards:
        return function(*args)

    def gathered():
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        return function(*args)

    try:
        return policy.call(gathered)  # through the policy, which FSDP2 must see first
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not policy, recurse=False)
