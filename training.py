"""What every training run here needs, whether by GRPO or by SFT: flags, batches, metrics, several processes.

Nothing in here is about an algorithm; `train_grpo.py` and `train_sft.py` are.
"""

import json
import os
import signal
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from tqdm import tqdm
from transformers import HfArgumentParser

from data import PROMPTS, BadInput, Example, check_audio, is_cut, load_audio, load_examples, make_batch, stream_indices


def run(main) -> None:
    """Call main; bad input becomes one line and exit status 1."""
    if not torch.cuda.is_available() and torch.get_num_threads() == 1:  # accelerate launch leaves one thread
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    try:
        main()
    except BadInput as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        helps = "--gradient_checkpointing, a smaller --micro_batch (training) or --batch_size (evaluation), --max_new_tokens or --lora_rank"
        sys.exit(f"error: the GPU's memory is full ({str(error).split('. ')[0]}); what helps: {helps}")


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The script's docstring as it stands, and every flag with its default."""


def parse(config_class, description: str, argv: list[str] | None = None):
    """Flags into a settings dataclass."""
    parser = HfArgumentParser(config_class, description=description, formatter_class=Help)
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise BadInput(f"unknown flag or value: {' '.join(unknown)} (--help lists the flags)")
    return config


def check_at_least(config, **bounds) -> None:
    """Raise BadInput for a setting below its bound."""
    for name, least in bounds.items():
        if getattr(config, name) < least:
            raise BadInput(f"--{name} must be at least {least}, not {getattr(config, name)}")


def make_folder(path: str) -> None:
    """Make a folder for results before there are any to lose."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--output {path or repr('')}: cannot be made ({error.strerror})") from None


def start(config) -> tuple[Accelerator, list[Example], list[Example]]:
    """Check what both kinds of training have in common, read the questions, open the output folder."""
    if config.log_with not in ("", "tensorboard", "wandb"):
        raise BadInput(f"--log_with {config.log_with}: unknown, choose tensorboard or wandb")
    # not PartialState(), which overlooks ACCELERATE_USE_CPU and finds one process where there are several
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # else DDP holds every gradient twice
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # while one process saves or merges, the others wait
    try:
        accelerator = Accelerator(log_with=config.log_with or None, project_dir=config.output, kwargs_handlers=[views, patience])
    except ValueError as error:
        raise BadInput(f"accelerate: {error}") from None
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise BadInput(f"--mixed_precision {accelerator.mixed_precision}: not supported, choose bf16 or no")
    if accelerator.is_fsdp2:
        if accelerator.mixed_precision == "bf16":  # accelerate's own policy would return log-probs in bf16
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    elif accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise BadInput(f"{accelerator.distributed_type}: not supported; plain processes and FSDP2 are (fsdp.yaml)")
    if config.prompt not in PROMPTS:
        raise BadInput(f"--prompt {config.prompt}: unknown, choose one of {', '.join(PROMPTS)}")
    if not config.data:
        raise BadInput("--data is missing: the file of training questions")
    check_at_least(config, prompts_per_step=1, micro_batch=1, save_every=1, eval_every=1, max_new_tokens=1, lr=0, seed=0)
    check_at_least(config, lora_rank=0, lora_alpha=0, keep_states=1)
    if not 0 <= config.lora_dropout < 1:
        raise BadInput(f"--lora_dropout must be from 0 to below 1, not {config.lora_dropout}")
    if config.merge and not config.lora_rank:
        raise BadInput("--merge is for LoRA, and --lora_rank is 0: there are no adapters to merge")
    if config.freeze_audio_encoder and config.lora_rank and config.lora_target != "language":
        raise BadInput("--freeze_audio_encoder is for training without LoRA; --lora_target says where adapters go")
    if config.prompts_per_step % (accelerator.num_processes * config.micro_batch):
        share = f"{accelerator.num_processes} process(es) x --micro_batch {config.micro_batch}"
        raise BadInput(f"--prompts_per_step {config.prompts_per_step} is not a multiple of {share}")
    examples = load_examples(config.data, config.audio_dir)
    eval_examples = load_examples(config.eval_data, config.audio_dir) if config.eval_data else []
    missing, unheard = (check_audio(part, config.skip_bad_audio) for part in (examples, eval_examples))
    used = os.path.exists(config.output) and (not os.path.isdir(config.output) or os.listdir(config.output))
    if used and not config.resume:
        raise BadInput(f"--output {config.output}: already holds a run or other files; --resume, remove it, or name another folder")

    accelerator.wait_for_everyone()  # until all have seen the folder empty
    if accelerator.is_main_process:
        make_folder(config.output)
    accelerator.init_trackers("r1-aqa", asdict(config))
    if config.log_with and accelerator.is_main_process and not accelerator.trackers:
        raise BadInput(f"--log_with {config.log_with}: not installed, pip install {config.log_with}")
    if missing or unheard:
        accelerator.print(f"clips missing: {missing} for training (other rows stand in), {unheard} held out (counted as wrong)")
    if accelerator.device.type == "cuda" and accelerator.mixed_precision == "no":
        accelerator.print("computing in fp32: `accelerate launch --mixed_precision bf16` is several times faster")
    return accelerator, examples, eval_examples


def read_batch(processor, examples: list[Example], config, first: int, B: int):
    """B examples from a place in the stream on, model inputs, metrics of the clips.

    With --skip_bad_audio the next row stands in for a bad one; else it raises BadInput.
    """
    batch, waves, skipped = [], [], 0
    for i in stream_indices(len(examples), config.seed, first, B):
        for k in range(len(examples)):  # the row itself, or the next that can be read
            example = examples[(i + k) % len(examples)]
            try:
                waves.append(load_audio(example.audio))
                break
            except BadInput as error:
                bad = BadInput(f"{example.place}: {error}")
                if not config.skip_bad_audio:
                    raise bad from None
                tqdm.write(f"skipped: {bad}")
                skipped += 1
        else:
            raise bad  # none is left to stand in
        batch.append(example)
    inputs = make_batch(processor, batch, waves, config.prompt)
    clips = {"clips_cut": sum(is_cut(processor, wave) for wave in waves) / B, "clips_skipped": skipped / B}
    return batch, inputs, clips


def batches(accelerator: Accelerator, processor, examples: list[Example], config, steps: range) -> Iterator:
    """For each step this process's B examples: their first place in the stream, themselves, model inputs, metrics of the clips.

    A thread reads and prepares the next step's while this one computes. Raises BadInput at a clip that cannot be read.
    """
    processor = deepcopy(processor)  # a tokenizer is not to be used by two threads at once
    B, jobs = config.prompts_per_step // accelerator.num_processes, deque()

    def ready(first, job):
        batch, inputs, clips = job.result()
        torch.manual_seed(config.seed + first)  # of LoRA's dropout, so that a resumed run draws the same
        return first, batch, {name: value.to(accelerator.device) for name, value in inputs.items()}, clips

    with ThreadPoolExecutor(1) as thread:
        for step in steps:
            first = step * config.prompts_per_step + accelerator.process_index * B
            jobs.append((first, thread.submit(read_batch, processor, examples, config, first, B)))
            if len(jobs) == 2:
                yield ready(*jobs.popleft())
        yield ready(*jobs.popleft())


def write_metrics(accelerator: Accelerator, config, step: int, metrics: dict) -> dict:
    """Mean over processes, as one line of metrics.jsonl and to the trackers; returned as floats of six digits."""
    values = torch.tensor([float(value) for value in metrics.values()], device=accelerator.device)
    values = accelerator.reduce(values, "mean").tolist()
    metrics = {name: float(f"{value:.6g}") for name, value in zip(metrics, values)}
    if accelerator.is_main_process:
        with open(os.path.join(config.output, "metrics.jsonl"), "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
    accelerator.log(metrics, step)
    return metrics


def read_metrics(folder: str) -> list[dict]:
    """The lines of a run's metrics.jsonl; a killed run may have left half a line, which is passed over."""
    try:
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            return [json.loads(line) for line in file if line.endswith("\n")]
    except OSError:
        return []


# ------------------------------------------------------------------------------------------------- several processes


def prepare(accelerator: Accelerator, policy, optimizer):
    """Policy and optimizer on their device: alone, copied to every process (DDP), or sharded over them (FSDP2)."""
    policy, optimizer = accelerator.prepare(policy, optimizer)
    register_fsdp_forward_method(policy, "call")
    return policy, optimizer


def prepare_frozen(accelerator: Accelerator, policy):
    """The same for a model that is not trained. accelerate's prepare takes one model only under FSDP2."""
    return fsdp2_prepare_model(accelerator, policy) if accelerator.is_fsdp2 else policy.to(accelerator.device)


def with_whole_weights(policy, function):
    """function(), which may run the model as often as it likes on this process.

    Under FSDP2 each forward gathers weights from all processes, and in sampling they run unequal numbers of forwards: so
    all weights are gathered once, before, and given back after.
    """
    shards = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    if not shards:
        return function()

    def gathered():
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        return function()

    try:
        return policy.call(gathered)  # through the policy, which FSDP2 must see first
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not policy, recurse=False)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor: under FSDP2 its shard, else all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_finite(accelerator: Accelerator, step: int, losses: list[torch.Tensor], grad_norm, batches: list[list[Example]]) -> None:
    """Raise BadInput, before the update, if on any process a micro-batch's loss or the gradient is not finite."""
    norm = float(grad_norm)  # under FSDP2 it is a distributed tensor
    finite = torch.isfinite(torch.stack([*losses, losses[0].new_tensor(norm)]))
    if accelerator.gather(finite.all()[None]).all():
        return
    bad = gather_object([example.place for ok, batch in zip(finite, batches) if not ok for example in batch])
    what = f"the loss is not finite (the gradient's norm is {norm})" if bad else f"the gradient is not finite (its norm is {norm})"
    bad = bad or gather_object([example.place for batch in batches for example in batch])
    raise BadInput(f"step {step}: {what}; this update was not made. Examples: {', '.join(bad)}")


class Interrupted:
    """Keeps the number of the first SIGTERM or Ctrl-C; a second one, 5 s later or more, leaves at once."""

    def __init__(self):
        self.number, self.since = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.number and time.monotonic() - self.since > 5:  # launchers repeat the first to each process
            os._exit(128 + number)
        if not self.number:
            self.number, self.since = number, time.monotonic()
            os.write(2, b"\nfinishing this step and saving; again in 5 s or more to leave at once\n")

    def anywhere(self, accelerator: Accelerator) -> int:
        """The signal's number, if any process has caught one: all must leave after the same step."""
        return int(accelerator.gather(torch.tensor([self.number], device=accelerator.device)).max())


def leave(accelerator: Accelerator, number: int, done: int, max_steps: int) -> None:
    """End the process as the signal would have, after the checkpoint was saved."""
    accelerator.print(f"stopped after {done} of {max_steps} steps; the same command with --resume goes on")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    sys.exit(128 + number)
