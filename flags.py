"""How every script is asked and answers: settings by flags, commands by name, bad input in one line."""

import argparse
import inspect
import math
import os
import sys
from dataclasses import dataclass

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from data import PROMPTS, BadInput, Example, printable
from model import DEFAULT_MODEL


def run_main(main) -> None:
    """Call a script's main(); bad input becomes one line and exit status 1."""
    for stream in (sys.stdout, sys.stderr):  # whose encoding may lack a character of the data
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not torch.cuda.is_available() and torch.get_num_threads() == 1:  # accelerate launch sets one thread
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    try:
        main()
    except (BadInput, OSError) as error:
        sys.exit("error: " + printable(str(error)).replace("\n", "\\n"))
    except torch.OutOfMemoryError as error:
        flags = "--gradient_checkpointing, --micro_batch, --batch_size, --max_new_tokens, --lora_rank"
        sys.exit(f"error: the GPU's memory is full ({str(error).split('. ')[0]}); flags that help: {flags}")


def warn_of_a_gpu_not_found() -> None:
    """Say so if this machine has an NVIDIA GPU that torch does not see: slow, and easy to overlook."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or "ACCELERATE_USE_CPU" in os.environ
    if not torch.cuda.is_available() and os.path.exists("/proc/driver/nvidia/version") and not hidden:
        reason = "its driver may be too old" if torch.version.cuda else "this is a build of torch for CPUs"
        say(f"no GPU is used, though the machine has one: {reason}; torch {torch.__version__}")


def warn_of_clips_by_name(examples: list[Example]) -> None:
    """Say how many clips were found by their file name alone, for those may be others."""
    if found := [example for example in examples if example.by_name]:
        first = f"the first: {found[0].location}, as {found[0].audio}"
        say(f"{len(found)} clips are not at their path and were found by their file name alone; {first}")


def say(text: str = "") -> None:
    """Print text that may come from data or a model."""
    print(printable(text))


def run_command(description: str, *functions) -> None:
    """Run the command that sys.argv names: a function, whose keyword-only parameters are its flags."""
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=description, **raw)
    commands = parser.add_subparsers(metavar="command", required=True)
    for function in functions:
        summary = function.__doc__.splitlines()[0]
        command = commands.add_parser(function.__name__, help=summary, description=function.__doc__, **raw)
        command.set_defaults(function=function)
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not parameter.KEYWORD_ONLY:
                command.add_argument(name)
            elif parameter.default is False:
                command.add_argument(f"--{name}", action="store_true")
            else:
                needed = parameter.default is parameter.empty
                command.add_argument(f"--{name}", required=needed, default=parameter.default)
    settings = vars(parser.parse_args())
    function = settings.pop("function")
    run_main(lambda: function(**settings))


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it stands, and every flag with its default."""


def parse(config_class, description: str, argv: list[str] | None = None):
    """Flags into a settings dataclass."""
    parser = HfArgumentParser(config_class, description=description, formatter_class=Help, allow_abbrev=False)
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise BadInput(f"unknown flag or value: {' '.join(unknown)} (--help lists the flags)")
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"--{name} must be a finite number, not {value}")
    return config


def is_given(*flags: str) -> bool:
    """Whether one of these flags is on the command line."""
    return any(word.partition("=")[0] in flags for word in sys.argv[1:])


def check_at_least(config, **bounds) -> None:
    """Raise BadInput for a setting below its bound."""
    for name, least in bounds.items():
        if getattr(config, name) < least:
            raise BadInput(f"--{name} must be at least {least}, not {getattr(config, name)}")


# ---------------------------------------------------------------- settings of any training


@dataclass
class TrainConfig:
    """What both kinds of training have in common."""

    model: str = HfArg(default=DEFAULT_MODEL, help="hub name or folder of a supported model")
    data: str = HfArg(default="", help="training questions: JSON or JSON Lines, see README")
    audio_dir: str = HfArg(default="", help="folder of the clips; empty: beside the questions")
    skip_bad_audio: bool = HfArg(default=False, help="skip and count what cannot be read, and do not stop")
    eval_data: str = HfArg(default="", help="questions to measure accuracy on while training; empty: none")
    eval_every: int = HfArg(default=100, help="steps between two such measurements")
    eval_batch_size: int = HfArg(default=16, help="questions that a process answers together in them")
    output: str = HfArg(default="runs/train", help="folder for metrics, checkpoints and the final model")
    prompt: str = HfArg(default="answer", help="plain, answer or think: prompt, format reward and extraction")
    max_new_tokens: int = HfArg(default=256, help="a completion without an end by then is cut and counted")
    prompts_per_step: int = HfArg(default=16, help="prompts per step, all processes together")
    micro_batch: int = HfArg(default=1, help="prompts in one forward of one process; results stay the same")
    lr: float = HfArg(default=1e-6, help="AdamW's learning rate at the start, decaying linearly to 0")
    max_steps: int = HfArg(default=1000, help="steps of prompts_per_step prompts")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint in --output")
    save_every: int = HfArg(default=100, help="steps between checkpoints")
    keep_states: int = HfArg(default=1, help="newest checkpoints that stay resumable; others keep the model")
    skip_steps: list[int] = HfArg(default_factory=list, help="steps to leave out: one whose loss is nan")
    seed: int = HfArg(default=42, help="seeds data order, sampling, new adapters and their dropout")
    freeze_audio_encoder: bool = HfArg(default=False, help="train the language model and the projector only")
    lora_rank: int = HfArg(default=0, help="train adapters of this rank (LoRA); 0: train the weights")
    lora_alpha: float = HfArg(default=32.0, help="the adapters' output is multiplied by alpha / rank")
    lora_dropout: float = HfArg(default=0.0, help="before the adapters; the sampler has none")
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
    check_at_least(config, prompts_per_step=1, micro_batch=1, max_new_tokens=1, eval_batch_size=1)
    check_at_least(config, save_every=1, eval_every=1, keep_states=1, lr=0, seed=0, lora_rank=0, lora_alpha=0)
    if not 0 <= config.lora_dropout < 1:
        raise BadInput(f"--lora_dropout must be from 0 to below 1, not {config.lora_dropout}")
    if config.merge and not config.lora_rank:
        raise BadInput("--merge is for LoRA, and --lora_rank is 0: there are no adapters to merge")
    if config.freeze_audio_encoder and config.lora_rank and config.lora_target != "language":
        raise BadInput("--freeze_audio_encoder is for training without LoRA; see --lora_target")
    if config.prompts_per_step % (processes * config.micro_batch):
        share = f"{processes} process(es) x --micro_batch {config.micro_batch}"
        raise BadInput(f"--prompts_per_step {config.prompts_per_step} is not a multiple of {share}")
