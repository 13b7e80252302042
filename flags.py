"""How every script is asked and answers: settings by flags, commands by name, bad input in one line."""

import argparse
import inspect
import os
import sys

import torch
from transformers import HfArgumentParser

from data import BadInput


def run_main(main) -> None:
    """Call a script's main(); bad input becomes one line and exit status 1."""
    if not torch.cuda.is_available() and torch.get_num_threads() == 1:  # accelerate launch sets one thread
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    try:
        main()
    except BadInput as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        flags = "--gradient_checkpointing, --micro_batch, --batch_size, --max_new_tokens, --lora_rank"
        sys.exit(f"error: the GPU's memory is full ({str(error).split('. ')[0]}); flags that help: {flags}")


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
                command.add_argument(
                    f"--{name}", required=needed, default=None if needed else parameter.default
                )
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
    return config


def is_given(*flags: str) -> bool:
    """Whether one of these flags is on the command line."""
    return any(word.partition("=")[0] in flags for word in sys.argv[1:])


def check_at_least(config, **bounds) -> None:
    """Raise BadInput for a setting below its bound."""
    for name, least in bounds.items():
        if getattr(config, name) < least:
            raise BadInput(f"--{name} must be at least {least}, not {getattr(config, name)}")
