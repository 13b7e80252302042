"""Everything of a training run but the algorithm: settings, setup, the loop over steps, several processes.

A script gets a run from `setup`, loops over `steps`, and ends with `finish`; what happens in a step is in
`train_grpo.py` and `train_sft.py`.
"""

import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from tqdm import tqdm

from checkpoints import append_metrics, append_rows, is_saved, mean_over_processes, read_metrics, resume
from checkpoints import save_checkpoint, save_final
from data import LOCK, BadInput, Batch, Example, check_audio, load_examples, lock_folder
from data import made_ahead, read_batch, select_rows
from flags import TrainConfig, check_settings, warn_of_a_gpu_not_found, warn_of_clips_by_name
from model import NotFinite, encode_audio, encoder_is_frozen, eos_tokens, sample, sampling_noise
from policy import Policy, check_memory, load_frozen, load_policy, weights_hash, with_whole_weights

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
    data_hash: str = ""  # of the training questions as they were read
    base_hash: str = ""  # of the weights that training starts from
    lock: object = None  # on the output folder
    followed: Batch = None  # prompts whose groups samples.jsonl shows again and again
    interrupted: "Interrupted" = None
    first_step: int = 0
    bar: tqdm = None
    updates: int = 0  # of the current step, as these are
    metrics: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=lambda: defaultdict(float))  # by phase
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
    examples, eval_examples, data_hash = load_questions(config, accelerator)
    lock = make_output(config, accelerator)
    model, processor, adapters = load_policy(config, accelerator)
    run = Run(config, accelerator, examples, eval_examples, model, processor, adapters, config.max_steps)
    run.data_hash, run.base_hash, run.lock = data_hash, weights_hash(model), lock
    run.eos_ids = eos_tokens(run.model, run.processor)
    separate_reference = with_reference and not run.adapters
    check_memory(accelerator, run.model, separate_reference)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    fused = accelerator.device.type == "cuda"  # under FSDP2 the default updates tensors one by one
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0, fused=fused)
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
    if accelerator.is_main_process:
        warn_of_a_gpu_not_found()
    if accelerator.device.type == "cuda" and accelerator.mixed_precision == "no":
        accelerator.print("computing in fp32; `accelerate launch --mixed_precision bf16` is much faster")
    return accelerator


def load_questions(config: TrainConfig, accelerator: Accelerator):
    """Questions to train on and held-out ones, whose clips are looked for, and the hash of the former."""
    examples, data_hash = load_examples(config.data, config.audio_dir)
    eval_examples, _ = load_examples(config.eval_data, config.audio_dir) if config.eval_data else ([], "")
    missing = check_audio(examples, config.skip_bad_audio)
    missing_eval = check_audio(eval_examples, config.skip_bad_audio)
    if accelerator.is_main_process:
        warn_of_clips_by_name([*examples, *eval_examples])
    if missing or missing_eval:
        parts = f"{missing} for training (the next row is used), {missing_eval} held out (counted as wrong)"
        accelerator.print(f"clips missing: {parts}")
    return examples, eval_examples, data_hash


def make_output(config: TrainConfig, accelerator: Accelerator):
    """Make and lock the output folder, start the trackers. Raises BadInput if the folder holds something."""
    output = config.output
    if not config.resume and os.path.exists(output):
        if not os.path.isdir(output) or set(os.listdir(output)) - {LOCK}:
            ways = "--resume, remove it, or name another folder"
            raise BadInput(f"--output {output}: already holds a run or other files; {ways}")
    accelerator.wait_for_everyone()  # until all have seen the folder empty
    lock = lock_folder(output) if accelerator.is_main_process else None
    settings = {name: str(value) for name, value in asdict(config).items()}  # a tracker refuses lists
    accelerator.init_trackers("r1-aqa", settings)
    if config.log_with and accelerator.is_main_process and not accelerator.trackers:
        raise BadInput(f"--log_with {config.log_with}: not installed, pip install {config.log_with}")
    return lock


# ---------------------------------------------------------------- batches


def batches(run: Run) -> Iterator[Batch]:
    """This process's batch for each step, made ahead."""
    config, accelerator = run.config, run.accelerator
    processor = deepcopy(run.processor)  # a tokenizer is not to be used by two threads at once

    def read(step: int) -> Batch:
        first = step * config.prompts_per_step + accelerator.process_index * run.prompts
        return read_batch(processor, run.examples, config, first, run.prompts)

    for batch in made_ahead(read, range(run.first_step, run.max_steps)):
        batch.inputs = {name: value.to(accelerator.device) for name, value in batch.inputs.items()}
        torch.manual_seed(config.seed + batch.first)  # for LoRA's dropout: a resumed run draws the same
        yield batch


# ---------------------------------------------------------------- what a step is made of


def steps(run: Run, accuracy: Callable[[Run], float], groups=None) -> Iterator[tuple[int, Batch]]:
    """Each step with its batch.

    Before each step it evaluates and writes samples.jsonl, if due (`groups` returns its rows), and sets the
    learning rate. After each step it writes the metrics and, if due, a checkpoint. If a process has a problem
    or caught a signal, all of them save and stop.
    """
    config, data, run.interrupted = run.config, batches(run), Interrupted()
    step_numbers, silent = range(run.first_step, run.max_steps), not run.accelerator.is_main_process
    run.bar = tqdm(step_numbers, total=run.max_steps, initial=run.first_step, disable=silent)
    run.last_lap = now()
    for step in run.bar:
        with stop_together(run, step):
            if run.eval_examples and step % config.eval_every == 0:
                run.metrics["eval_accuracy"] = accuracy(run)
                lap(run, "eval")
            if groups and config.samples_every and step % config.samples_every == 0:
                append_rows(run, "samples.jsonl", groups(run, step))
                lap(run, "follow")
            batch = next(data)
        if step in config.skip_steps:
            run.accelerator.print(f"step {step}: skipped, as --skip_steps says")
        else:
            for group in run.optimizer.param_groups:
                group["lr"] = config.lr * (1 - step / run.max_steps)
            run.metrics |= batch.metrics
            run.updates = 0
            lap(run, "other")
            yield step, batch
        with stop_together(run, step + 1):
            append_metrics(run, step)
            lap(run, "other")
        if (step + 1) % config.save_every == 0:
            save_checkpoint(run, step + 1)
            lap(run, "save")


@contextmanager
def stop_together(run: Run, done: int) -> Iterator[None]:
    """If a process has a problem inside or caught a signal, save what `done` steps made and end them all."""
    accelerator, problem = run.accelerator, None
    try:
        yield
    except (BadInput, OSError) as error:
        problem = error
    reasons = torch.tensor([[run.interrupted.number, problem is not None]], device=accelerator.device)
    signal_number, any_problem = accelerator.gather(reasons).max(0).values.tolist()
    if not signal_number and not any_problem:
        return
    if done > run.first_step and not is_saved(run, done):
        try:
            save_checkpoint(run, done)
        except BadInput as error:
            raise BadInput(f"{problem}; {error}" if problem else str(error)) from None
    steps_done = f"{done} of {run.max_steps} steps"
    accelerator.print(f"stopped after {steps_done}; the same command with --resume goes on")
    if problem:
        end(run)  # with the others, who wait for each other there
        raise problem
    end(run, 1 if any_problem else 128 + signal_number)


def followed_batch(run: Run) -> Batch:
    """The first prompts of the run, five at most."""
    if run.followed is None:
        n = min(5, run.config.prompts_per_step, len(run.examples))
        run.followed = read_batch(run.processor, run.examples, run.config, 0, n)
        inputs = run.followed.inputs.items()
        run.followed.inputs = {name: value.to(run.accelerator.device) for name, value in inputs}
    return run.followed


def generate(run: Run, batch: Batch, group_size: int, temperature: float):
    """draw_groups for a step: if a process has a problem, all of them stop."""
    with stop_together(run, batch.first // run.config.prompts_per_step):
        completions = draw_groups(run, batch, group_size, temperature)
    lap(run, "sample")
    return completions


def draw_groups(run: Run, batch: Batch, group_size: int, temperature: float):
    """A group of completions for each prompt of the batch: ids and mask (B, G, T).

    A frozen encoder runs here, once: its output joins batch.inputs, for scoring and update.
    """
    shape = group_size, run.config.max_new_tokens
    # random numbers are tied to the prompt: neither processes nor batches change a sample
    noise = [sampling_noise(run.config.seed, batch.first + b, *shape) for b in range(len(batch.examples))]
    noise = torch.stack(noise).to(run.accelerator.device)  # (B, G, T)

    @torch.no_grad()
    def encode_and_sample():
        if encoder_is_frozen(run.model):
            batch.inputs["encoded_audio"] = encode_audio(run.model, batch.inputs)
        return sample(run.model, batch.inputs, run.eos_ids, shape[1], temperature, noise)

    run.policy.eval()
    try:
        with run.accelerator.autocast():
            return with_whole_weights(run.policy, encode_and_sample)
    except NotFinite as error:
        location = batch.examples[error.args[0]].location
        raise BadInput(f"{location}: the model's logits are not finite numbers") from None


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
            # FSDP2 keeps its root gathered: adapters in it would come back in that copy only
            if run.accelerator.is_fsdp2:
                run.reference.reshard()
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
    if problem := not_finite(run, step, batch, losses, grad_norm):
        if run.updates == 0:  # else the weights are those of no whole step, and are not saved
            with stop_together(run, step):
                raise problem
        raise problem
    run.optimizer.step()
    # DDP's gradients are views of its buckets: set to None, they would be allocated a second time
    run.optimizer.zero_grad(set_to_none=not isinstance(run.policy, DistributedDataParallel))
    run.updates += 1
    lap(run, "update")
    return grad_norm


def not_finite(run: Run, step: int, batch: Batch, losses: list[torch.Tensor], grad_norm: float):
    """What is not finite on any process, with the examples, as BadInput; None if all is well."""
    # one entry for each micro-batch, then the gradient's
    finite = torch.stack([loss.isfinite().all() for loss in [*losses, losses[0].new_tensor(grad_norm)]])
    if run.accelerator.gather(finite.all()[None]).all():
        return None
    parts = [batch.examples[rows] for rows in run.micro_batches]
    bad = gather_object([e.location for ok, part in zip(finite, parts) if not ok for e in part])
    what = "loss" if bad else "gradient"
    bad = bad or gather_object([example.location for example in batch.examples])
    what = f"the {what} is not finite (the gradient's norm is {grad_norm}); this update was not made"
    way = f"--resume --skip_steps {step} goes on without them"
    return BadInput(f"step {step}: {what}. Examples: {', '.join(bad)}; {way}")


def log(run: Run, metrics: dict, shown: tuple[str, ...]) -> None:
    """Take the metrics of a step, to be written after it, as means over processes; show some on the bar."""
    metrics = run.metrics | metrics | {"lr": run.optimizer.param_groups[0]["lr"]}
    metrics |= {f"seconds_{phase}": value for phase, value in run.seconds.items()}
    if run.accelerator.device.type == "cuda":
        metrics["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9  # at most, so far
    run.metrics = mean_over_processes(run, metrics)
    total = round(sum(run.seconds.values()), 2)
    run.bar.set_postfix({name: run.metrics[name] for name in shown} | {"seconds": total})
    run.seconds.clear()


def finish(run: Run, accuracy: Callable[[Run], float], groups=None) -> None:
    """Measure the final model, save it, end. accuracy, groups: as in `steps`."""
    output = run.config.output
    with stop_together(run, run.max_steps):
        if groups and run.config.samples_every:
            append_rows(run, "samples.jsonl", groups(run, run.max_steps))
        after = accuracy(run) if run.eval_examples else None
    if run.eval_examples:
        run.metrics = mean_over_processes(run, {"eval_accuracy": after})
        with stop_together(run, run.max_steps):
            append_metrics(run, run.max_steps)
        measured = [line["eval_accuracy"] for line in read_metrics(output)[0] if "eval_accuracy" in line]
        before = f"{[*measured, after][0]:.1%} at first"
        run.accelerator.print(f"held-out accuracy: {before}, {after:.1%} after {run.max_steps} steps")
    save_final(run)
    run.accelerator.print(f"the model is in {output}; to see the run: python report.py {output}")
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
