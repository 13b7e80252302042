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


# accelerate knows FSDP2 on accelerators only; two names make it believe that a CPU is one
FSDP2_ON_CPU = """
from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
"""


def launch(code: str, *flags, precision: str = "no", fsdp: bool = False, root: str = ROOT) -> None:
    """Run `code` in two processes, with these flags as sys.argv[1:]; with `fsdp` as fsdp.yaml has it, with the scripts of `root`."""
    code = (
        (FSDP2_ON_CPU if fsdp else "") + "from accelerate import Accelerator\n"
        "assert Accelerator().num_processes == 2\n"  # without --multi_gpu accelerate starts one, and says nothing
        f"assert Accelerator().is_fsdp2 is {fsdp}\n"
        f"import sys; sys.path.insert(0, {root!r})\n{code}\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        how = ["--config_file", f"{ROOT}/fsdp.yaml", "--num_processes", "2", "--main_process_port", "0"] if fsdp else TWO.split()
        command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", precision, *how]
        command += [script.name, *map(str, flags)]
        cpu = {"ACCELERATE_TORCH_DEVICE": "cpu"} if fsdp else {"ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=os.environ | cpu, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
