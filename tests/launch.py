"""Two processes on a CPU, by accelerate, and the certainty that there were two."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = str(Path(__file__).parent.parent)
TWO = "--multi_gpu --num_processes 2 --num_machines 1 --dynamo_backend no --main_process_port 0"


def as_flags(config) -> list[str]:
    """Settings as the flags that give them."""
    return [f"--{name}={value}" for name, value in vars(config).items() if value != ""]


def launch(code: str, *flags, precision: str = "no") -> None:
    """Run `code` in two processes, with these flags as sys.argv[1:]."""
    code = (
        "from accelerate import Accelerator\n"
        "assert Accelerator().num_processes == 2\n"  # without --multi_gpu accelerate starts one, and says nothing
        f"import sys; sys.path.insert(0, {ROOT!r})\n{code}\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", precision, *TWO.split()]
        command += [script.name, *map(str, flags)]
        done = subprocess.run(command, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
