"""The command line of every script: parse flags into settings, report bad input in one line."""

import argparse
import math
import os
import re
import sys
from contextlib import contextmanager

import torch
from tqdm import tqdm
from transformers import HfArgumentParser


class BadInput(Exception):
    """Bad input, described in one line: what, in which file or row, and what to do."""


@contextmanager
def located(location: str, errors=Exception):
    """Turn an exception in the block into a one-line BadInput for `location`: file, row, model or flag.

    errors: the exceptions to convert; with BadInput, all others keep their traceback.
    """
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{location}: {error}") from None
    except errors as error:
        first_line = str(error).strip().partition("\n")[0]
        raise BadInput(f"{location}: {type(error).__name__}: {first_line}".rstrip(": ")) from None


def run_main(main) -> None:
    """Call a script's main(). Bad input ends it with one line and exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # the terminal may not support every character

    # `accelerate launch` sets one thread per process, which leaves the other cores idle. It matters with a
    # GPU too: the CPU loads, checks and hashes the weights and computes the audio features
    if torch.get_num_threads() == 1:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, os.cpu_count() // processes))

    try:
        main()
    except (BadInput, OSError) as error:
        sys.exit("error: " + printable(str(error)).replace("\n", "\\n"))
    except torch.OutOfMemoryError as error:
        flags = "--gradient_checkpointing, --micro_batch, --sample_batch, --batch_size, --max_new_tokens"
        flags += ", --lora_rank, --load_in_4bit"
        sys.exit(f"error: the GPU is out of memory ({str(error).split('. ')[0]}); flags that help: {flags}")


def printable(text: str) -> str:
    """Escape control characters: text from a dataset or a model must not steer the terminal."""
    controls = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(controls, lambda match: match[0].encode("unicode_escape").decode(), text)


def progress_bar(iterable=None, **options) -> tqdm:
    """tqdm, but with only one line a minute in a log file."""
    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 60, **options)


def say(text: str = "") -> None:
    """Print text that may come from a dataset or a model."""
    print(printable(text))


# ---------------------------------------------------------------- settings


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the script's docstring as it stands, and every flag with its default."""


def parse(config_class, description: str, argv: list[str] | None = None):
    """Parse flags into a settings dataclass. Raises BadInput for unknown flags and for nan or inf."""
    parser = HfArgumentParser(config_class, description=description, formatter_class=Help, allow_abbrev=False)
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise BadInput(f"unknown flag or value: {' '.join(unknown)} (--help lists the flags)")
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"--{name} must be a finite number, not {value}")
    return config


def is_given(*flags: str) -> bool:
    """Whether the command line names one of these flags."""
    return any(word.partition("=")[0] in flags for word in sys.argv[1:])


def check_at_least(config, **bounds) -> None:
    """Raise BadInput for a setting below its lower bound."""
    for name, least in bounds.items():
        if getattr(config, name) < least:
            raise BadInput(f"--{name} must be at least {least}, not {getattr(config, name)}")
