"""What every training run needs, whatever the algorithm: settings, setup, batches, logging, stopping.

The training steps themselves are in `train_grpo.py` and `train_sft.py`.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from checkpoints import is_saved, names_to_save, record_code, resume, save_checkpoint
from cli import BadInput, check_at_least, located, printable, say
from data import LOCK, PROMPTS, Batch, Example, check_audio, load_examples, lock_folder, prefetch, read_batch
from model import DEFAULT_MODEL, PARTS, Policy, eos_tokens, has_model, load_policy, load_reference

# ---------------------------------------------------------------- settings


@dataclass
class TrainConfig:
    """Settings that GRPO and SFT share."""

    model: str = HfArg(default=DEFAULT_MODEL, help="hub name or folder of a supported model")
    data: str = HfArg(default="", help="training questions: JSON or JSON Lines, see README")
    audio_dir: str = HfArg(default="", help="folder with the clips; empty: next to the questions")
    skip_bad_audio: bool = HfArg(default=False, help="skip and count clips that cannot be read")
    eval_data: str = HfArg(default="", help="held-out questions for accuracy during training; empty: none")
    eval_every: int = HfArg(default=100, help="steps between evaluations")
    eval_silence: bool = HfArg(default=True, help="also evaluate with silence in place of the clips")
    eval_batch_size: int = HfArg(default=16, help="questions per forward pass in evaluation")
    output: str = HfArg(default="runs/train", help="folder for metrics, checkpoints and the final model")
    prompt: str = HfArg(
        default="answer", help="plain, answer or think; sets the prompt, the format reward and the extraction"
    )
    max_new_tokens: int = HfArg(default=256, help="longest completion; longer ones are truncated and counted")
    prompts_per_step: int = HfArg(default=16, help="prompts per step, over all processes")
    micro_batch: int = HfArg(default=1, help="prompts per forward pass per process; does not change results")
    lr: float = HfArg(default=1e-6, help="initial AdamW learning rate, decays linearly to 0")
    warmup_steps: int = HfArg(default=0, help="steps over which the learning rate rises linearly to --lr")
    max_steps: int = HfArg(default=1000, help="steps of prompts_per_step prompts")
    resume: bool = HfArg(default=False, help="continue from the newest checkpoint in --output")
    save_every: int = HfArg(default=100, help="steps between checkpoints")
    keep_states: int = HfArg(default=1, help="number of checkpoints that stay resumable; all keep the model")
    skip_steps: list[int] = HfArg(default_factory=list, help="steps to skip, such as one with a nan loss")
    seed: int = HfArg(default=42, help="seeds data order, sampling, new adapters and their dropout")
    train: list[str] = HfArg(
        default_factory=list,
        help="parts to train: encoder, projector, language; empty: all, or with LoRA only language",
    )
    lora_rank: int = HfArg(default=0, help="train adapters of this rank in all linear layers (LoRA); 0: none")
    lora_alpha: float = HfArg(default=32.0, help="the adapters' output is multiplied by alpha / rank")
    lora_dropout: float = HfArg(default=0.0, help="dropout rate before the adapters, in updates only")
    load_in_4bit: bool = HfArg(default=False, help="LoRA: keep the base in 4 bits (needs bitsandbytes)")
    merge: bool = HfArg(default=False, help="LoRA: also write the merged final model to merged/ in --output")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, more time")
    log_with: str = HfArg(default="", help="tensorboard or wandb, in addition to metrics.jsonl")


def check_settings(config: TrainConfig, processes: int) -> None:
    """Raise BadInput for settings that are invalid in any training run."""
    if config.prompt not in PROMPTS:
        raise BadInput(f"--prompt {config.prompt}: unknown, choose one of {', '.join(PROMPTS)}")
    if not config.data:
        raise BadInput("--data is missing: the file of training questions")
    check_at_least(config, prompts_per_step=1, micro_batch=1, max_new_tokens=1, eval_batch_size=1)
    check_at_least(config, save_every=1, eval_every=1, keep_states=1, lr=0, seed=0, lora_rank=0, lora_alpha=0)
    check_at_least(config, warmup_steps=0)
    if not 0 <= config.lora_dropout < 1:
        raise BadInput(f"--lora_dropout must be at least 0 and below 1, not {config.lora_dropout}")
    if config.merge and not config.lora_rank:
        raise BadInput("--merge needs LoRA adapters, but --lora_rank is 0")
    if config.load_in_4bit and not config.lora_rank:
        raise BadInput("--load_in_4bit needs LoRA adapters, but --lora_rank is 0")
    unknown = [part for part in config.train if part not in PARTS]
    if unknown:
        raise BadInput(f"--train {unknown[0]}: unknown, choose from {', '.join(PARTS)}")
    if config.prompts_per_step % (processes * config.micro_batch):
        share = f"{processes} process(es) x --micro_batch {config.micro_batch}"
        raise BadInput(f"--prompts_per_step {config.prompts_per_step} is not a multiple of {share}")


# ---------------------------------------------------------------- setup


@dataclass
class Run:
    """The parts of a training run."""

    config: TrainConfig
    accelerator: Accelerator
    examples: list[Example]
    eval_examples: list[Example]
    model: nn.Module
    processor: object
    adapters: object  # the PeftModel; None without LoRA
    policy: nn.Module  # a Policy around the model, as accelerate wraps it
    reference: nn.Module  # a second Policy; under LoRA the one inside `policy`; None without KL
    optimizer: torch.optim.Optimizer
    fused_optimizer: bool
    eos_ids: list[int]
    max_steps: int
    prompts: int  # per step on this process
    micro_batches: list[slice]  # rows of a batch that go through one forward pass
    data_hash: str  # of the training questions
    base_hash: str  # of the weights that training starts from
    saved_names: set[str]  # of the weights in a checkpoint
    lock: object  # on the output folder
    first_step: int = 0
    signals: list[int] = field(default_factory=list)  # numbers of the signals received


def setup(config: TrainConfig, temperature: float = 1.0, with_reference: bool = False) -> Run:
    """Check everything that can be checked, read the questions, load the models, resume."""
    accelerator = make_accelerator(config)
    check_settings(config, accelerator.num_processes)
    examples, data_hash = load_questions(accelerator, config, config.data)
    eval_examples = []
    if config.eval_data:
        eval_examples, _ = load_questions(accelerator, config, config.eval_data)
    lock = make_output(config, accelerator)
    if config.resume and has_model(config.output):
        accelerator.print(f"--resume: the run in {config.output} is finished")
        accelerator.end_training()
        sys.exit()

    model, processor, adapters, base_hash = load_policy(config, accelerator)
    trained = [p for p in model.parameters() if p.requires_grad]
    saved_names = names_to_save(model, adapters)
    parameters = f"{model.num_parameters() / 1e6:,.1f} M parameters"
    accelerator.print(f"{parameters}, {sum(p.numel() for p in trained) / 1e6:,.1f} M trained")

    fused = accelerator.device.type == "cuda"  # under FSDP2 the default would update tensors one by one
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0, fused=fused)
    policy, optimizer = accelerator.prepare(Policy(model, temperature), optimizer)
    if accelerator.is_fsdp2:  # the first module that runs becomes its root: it must be the policy
        register_fsdp_forward_method(policy, "initialize")
        policy.initialize()
        policy.reshard()

    reference = None
    if with_reference and adapters:
        reference = accelerator.unwrap_model(policy)  # without DDP, which is only needed for gradients
    elif with_reference:
        reference = Policy(load_reference(config, accelerator), temperature)
        if accelerator.is_fsdp2:  # accelerate's own prepare takes only one model
            reference = fsdp2_prepare_model(accelerator, reference)
        else:
            reference = reference.to(accelerator.device)

    prompts = config.prompts_per_step // accelerator.num_processes
    micro_batches = [slice(i, i + config.micro_batch) for i in range(0, prompts, config.micro_batch)]
    run = Run(
        config=config,
        accelerator=accelerator,
        examples=examples,
        eval_examples=eval_examples,
        model=model,
        processor=processor,
        adapters=adapters,
        policy=policy,
        reference=reference,
        optimizer=optimizer,
        fused_optimizer=fused,
        eos_ids=eos_tokens(model, processor),
        max_steps=config.max_steps,
        prompts=prompts,
        micro_batches=micro_batches,
        data_hash=data_hash,
        base_hash=base_hash,
        saved_names=saved_names,
        lock=lock,
    )
    run.first_step = resume(run)
    if accelerator.is_main_process:
        record_code(run)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP: keep it ignored
            signal.signal(number, lambda number, frame: run.signals.append(number))
    return run


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Create the Accelerator. Raises BadInput for unsupported setups."""
    # without views into its buckets, DDP would hold every gradient twice
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # the others wait while one process saves
    with located("accelerate"):
        accelerator = Accelerator(
            log_with=config.log_with or None, project_dir=config.output, kwargs_handlers=[ddp, timeout]
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise BadInput(f"--mixed_precision {accelerator.mixed_precision}: not supported, choose bf16 or no")
    if accelerator.state.dynamo_plugin.backend != "NO":
        raise BadInput("accelerate's dynamo_backend must be no (ACCELERATE_DYNAMO_BACKEND)")
    if accelerator.gradient_accumulation_steps != 1:
        raise BadInput("accelerate's gradient_accumulation_steps must be 1: use --micro_batch instead")
    if accelerator.is_fsdp2:
        if config.load_in_4bit:
            raise BadInput("--load_in_4bit: FSDP2 cannot shard 4-bit weights; use DDP")
        plugin = accelerator.state.fsdp_plugin
        if plugin.auto_wrap_policy is not transformer_auto_wrap_policy:
            raise BadInput("accelerate's fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP")
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.cpu_ram_efficient_loading:
            raise BadInput("accelerate's fsdp_offload_params and cpu_ram_efficient_loading must be false")
        if plugin.activation_checkpointing:  # ours does the same without renaming weights
            plugin.activation_checkpointing = False
            config.gradient_checkpointing = True
        if accelerator.mixed_precision == "bf16":  # accelerate's own policy would return log-probs in bf16
            precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            plugin.mixed_precision_policy = precision
    elif accelerator.distributed_type not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise BadInput(f"{accelerator.distributed_type}: not supported, use DDP or FSDP2 (fsdp.yaml)")
    warn_about_gpu(accelerator)
    return accelerator


def warn_about_gpu(accelerator: Accelerator) -> None:
    """Warn if the GPU is unused or badly used: that is slow and easy to overlook."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or "ACCELERATE_USE_CPU" in os.environ
    if not torch.cuda.is_available() and os.path.exists("/proc/driver/nvidia/version") and not hidden:
        reason = "its driver may be too old" if torch.version.cuda else "this torch is a CPU-only build"
        accelerator.print(f"this machine has a GPU that is not used: {reason}; torch {torch.__version__}")
    if accelerator.device.type == "cuda" and accelerator.mixed_precision == "no":
        accelerator.print("computing in fp32; `accelerate launch --mixed_precision bf16` is much faster")


def load_questions(accelerator: Accelerator, config: TrainConfig, path: str):
    """Load questions, check that their clips exist, and return them with the hash of their file."""
    examples, digest = load_examples(path, config.audio_dir)
    missing = check_audio(examples, config.skip_bad_audio)
    if accelerator.is_main_process:
        if missing:
            say(f"{path}: {missing} clips are missing; training takes the next row instead")
        warn_about_clips(examples)
    return examples, digest


def warn_about_clips(examples: list[Example]) -> None:
    """Warn about clips found by their file name alone: they may be the wrong ones."""
    found = [example for example in examples if example.found_by_name]
    if found:
        first = f"the first: {found[0].location}, as {found[0].audio}"
        say(f"{len(found)} clips are not at their path and were found by their file name alone; {first}")


def make_output(config: TrainConfig, accelerator: Accelerator):
    """Create and lock the output folder and start the trackers. Raises BadInput if the folder is in use."""
    output = config.output
    if not config.resume and os.path.exists(output):
        if not os.path.isdir(output) or set(os.listdir(output)) - {LOCK}:
            raise BadInput(f"--output {output}: already exists; use --resume, remove it, or name another")
    accelerator.wait_for_everyone()  # until all processes have seen the empty folder
    lock = lock_folder(output) if accelerator.is_main_process else None
    settings = {name: str(value) for name, value in asdict(config).items()}  # trackers refuse lists
    accelerator.init_trackers("r1-aqa", settings, {"wandb": {"dir": output}})
    if config.log_with and accelerator.is_main_process and not accelerator.trackers:
        raise BadInput(f"--log_with {config.log_with}: not installed, pip install {config.log_with}")
    return lock


# ---------------------------------------------------------------- parts of a step


def read_batches(run: Run) -> Iterator[Batch]:
    """This process's batch for each step, prepared ahead in a thread."""
    processor = deepcopy(run.processor)  # a tokenizer must not be used by two threads at once
    offset = run.accelerator.process_index * run.prompts

    def read(step: int) -> Batch:
        first = step * run.config.prompts_per_step + offset
        return read_batch(processor, run.examples, run.config, first, run.prompts)

    for batch in prefetch(read, range(run.first_step, run.max_steps)):
        batch.inputs = {name: value.to(run.accelerator.device) for name, value in batch.inputs.items()}
        yield batch


@contextmanager
def reference_policy(run: Run) -> Iterator[nn.Module]:
    """The reference, without gradients. Under LoRA it is the policy with its adapters off."""
    adapters_off = run.adapters.disable_adapter() if run.adapters else nullcontext()
    with torch.no_grad(), run.accelerator.autocast(), adapters_off:
        yield run.reference
        if run.accelerator.is_fsdp2:
            # FSDP2 leaves its root gathered: adapters in it would only be trained in that copy
            run.reference.reshard()


def check_update(run: Run, step: int, batch: Batch, losses: list[torch.Tensor], grad_norm: float) -> None:
    """Raise BadInput, on all processes, if a loss (one per micro-batch) or the gradient is nan or inf."""
    finite = [bool(loss.isfinite()) for loss in losses]
    is_good = all(finite) and grad_norm < float("inf")
    if run.accelerator.gather(torch.tensor([is_good], device=run.accelerator.device)).all():
        return
    bad = []
    for is_finite, rows in zip(finite, run.micro_batches):
        if not is_finite:
            bad += [example.location for example in batch.examples[rows]]
    bad = gather_object(bad)
    problem = f"the loss is nan or inf for {', '.join(bad)}" if bad else f"the gradient's norm is {grad_norm}"
    raise BadInput(f"step {step}: {problem}; no update was made; --resume --skip_steps {step} skips it")


@contextmanager
def stop_together(run: Run, steps_done: int, can_save: bool = True) -> Iterator[None]:
    """Make all processes save and stop if one of them raises an error in the block or has received a signal.

    Every process must enter it. Nothing in the block may wait for another process after an error. With
    can_save=False nothing is saved, and a signal waits for the next block.
    """
    accelerator = run.accelerator
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    number = max(run.signals, default=0) if can_save else 0
    status = torch.tensor([[number, problem is not None]], device=accelerator.device)
    signal_number, any_problem = accelerator.gather(status).max(0).values.tolist()
    if not signal_number and not any_problem:
        return

    if can_save and steps_done > run.first_step and not is_saved(run, steps_done):
        try:
            save_checkpoint(run, steps_done)
        except BadInput as error:
            problem = BadInput(f"{problem}; {error}") if problem else error
    accelerator.print(f"stopped after {steps_done} of {run.max_steps} steps; continue with --resume")
    end_run(run)
    if problem:
        raise problem
    sys.exit(1 if any_problem else 128 + signal_number)


def end_run(run: Run) -> None:
    """Wait until every process is done, and leave the process group. The run cannot be used afterwards."""
    run.accelerator.wait_for_everyone()
    # DDP holds the process group. Without it, end_training also ends gloo's threads; one that still frees a
    # tensor while Python exits would abort this process, and with it the whole launch
    run.policy = None
    run.accelerator.free_memory()
    run.accelerator.end_training()


# ---------------------------------------------------------------- logging


def mean_over_processes(run: Run, metrics: dict) -> dict[str, float]:
    """The mean of each metric over all processes."""
    values = torch.tensor([float(value) for value in metrics.values()], device=run.accelerator.device)
    return dict(zip(metrics, run.accelerator.reduce(values, "mean").tolist()))


def token_means(run: Run, sums: dict[str, torch.Tensor], count: torch.Tensor) -> dict[str, float]:
    """Means over all tokens of a step, on all processes, from this process's sums and number of tokens."""
    totals = run.accelerator.reduce(torch.stack([*sums.values(), count.to(torch.float32)]), "sum")
    return dict(zip(sums, (totals[:-1] / totals[-1]).tolist()))


def log_metrics(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Append a line to metrics.jsonl, and send it to the trackers."""
    metrics = {name: float(f"{value:.6g}") for name, value in metrics.items()}
    run.accelerator.log(metrics, step)
    append_rows(run, "metrics.jsonl", [{"step": step, **metrics}])


def append_rows(run: Run, name: str, rows: list[dict]) -> None:
    """Append rows to a JSON Lines file of the run; only the main process writes."""
    if run.accelerator.is_main_process:
        path = os.path.join(run.config.output, name)
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def learning_rate(run: Run, step: int) -> float:
    """Rises linearly over --warmup_steps, and decays linearly to 0 at the end of the run."""
    warmup = min(1.0, (step + 1) / max(1, run.config.warmup_steps))
    return run.config.lr * warmup * (1 - step / run.max_steps)


def announce(run: Run, text: str) -> None:
    """Print a line above the progress bar; it may contain text from a dataset or a model."""
    if run.accelerator.is_main_process:
        tqdm.write(printable(text))


def now() -> float:
    """The time in seconds, once the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
