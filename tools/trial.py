"""What to check first on a GPU, the most useful checks first, in under eight minutes on an H100.

    python -m tools.trial                       # writes each result to trial.jsonl when it is ready
    python -m tools.trial --tiny                # the same stages with a tiny model, on any machine

Each stage is a process with a time limit of its own, so one that hangs or fails does not stop the others.
Their output goes to trial.jsonl.log. The model has the 7B configuration and random weights.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

import toy
from cli import BadInput, parse, run_main
from model import repeated_logps, sample, shared_prompt_logps
from tools import benchmark

ROOT = Path(__file__).parent.parent
TOTAL_SECONDS = 470


@dataclass
class Config:
    output: str = HfArg(default="trial.jsonl", help="results file, JSON Lines; a new trial replaces it")
    tiny: bool = HfArg(default=False, help="use a tiny model: to see that the stages run, not to measure")
    stage: str = HfArg(default="", help="run only this stage, in this process")
    folder: str = HfArg(default="", help="for --stage: where the stages share the model's weights")


def write(config: Config, **values) -> None:
    """Append a result of this stage, and print it."""
    line = json.dumps({"stage": config.stage, **values})
    print(line, flush=True)
    with open(config.output, "a") as file:
        file.write(line + "\n")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_model(config: Config):
    """The 7B model, or a tiny one with --tiny; in bf16, or in fp32 without a GPU."""
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    return benchmark.make_model("tiny" if config.tiny else "7b", device(), dtype)


# ---------------------------------------------------------------- stages


def card(config: Config) -> None:
    """The GPU, its speed, and the package versions."""
    packages = ("torch", "transformers", "accelerate", "peft")
    versions = {name: importlib.metadata.version(name) for name in packages}
    write(config, versions=versions, cpus=os.cpu_count(), threads=torch.get_num_threads())
    if device() == "cuda":
        free, total = torch.cuda.mem_get_info()
        write(config, card=torch.cuda.get_device_name(), free_gb=free / 1e9, total_gb=total / 1e9)
        source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
        benchmark.seconds(source.clone)  # warm-up
        write(config, memory_tb_a_second=2 * 2**31 / benchmark.seconds(source.clone) / 1e12)
    for dtype in (torch.float32, torch.bfloat16):
        rate = benchmark.matrix_rate(torch.device(device()), dtype)
        write(config, dtype=str(dtype), matrix_tflops=rate / 1e12)


def agreement(config: Config) -> None:
    """Log-probs and gradients of the shared and the repeated way, in fp32 and bf16, against fp32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    lengths = (10, 16)
    for extra in (0, 1, 2, 3):  # different row lengths, one of them 64 modulo 128
        model = benchmark.make_model("tiny" if config.tiny else "small", device(), torch.float32)
        inputs, ids, mask = benchmark.make_group(model, 1, 4, 2, lengths)
        row = inputs["input_ids"].shape[1] + int(mask.sum())
        filler = torch.randint(10, 100, (1, (64 - row) % 128 + extra), device=device())
        inputs["input_ids"] = torch.cat([inputs["input_ids"], filler], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

        truth, true_gradient = logps_and_gradient(repeated_logps, model, inputs, ids, mask)
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype)
            for name, way in (("shared", shared_prompt_logps), ("repeated", repeated_logps)):
                logps, gradient = logps_and_gradient(way, model, inputs, ids, mask)
                error = (logps - truth).abs()
                relative = (gradient - true_gradient).norm() / true_gradient.norm()
                write(
                    config,
                    row=row + filler.shape[1],
                    way=name,
                    dtype=str(dtype),
                    logps_max_error=error.max().item(),
                    logps_mean_error=(error.sum() / mask.sum()).item(),
                    gradient_error=relative.item(),
                )


def logps_and_gradient(way, model, inputs, ids, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (B, G, T), and the gradient of their sum as one long vector, both in fp32."""
    model.zero_grad()
    logps = way(model, inputs, ids, mask, 1.0)
    logps.sum().backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return logps.detach().float(), torch.cat(gradients)


def distribution(config: Config) -> None:
    """How far the frequencies of sampled first tokens are from the softmax, in standard deviations."""
    N = 2_000 if config.tiny else 20_000
    model = benchmark.make_model("tiny" if config.tiny else "small", device(), torch.float32)
    inputs, _, _ = benchmark.make_group(model, 1, 1, 2, (1, 1))
    noise = 1 - torch.rand(1, N, 1, generator=torch.Generator().manual_seed(0))
    ids, _ = sample(model, inputs, [-1], 1, 0.05, noise.to(device()))
    with torch.no_grad():
        p = torch.softmax(model(**inputs).logits[0, -1].double() / 0.05, -1)
    frequencies = torch.bincount(ids.flatten(), minlength=len(p)) / N
    likely = p > 10 / N
    sigma = (frequencies - p).abs() / (p * (1 - p) / N).sqrt()
    write(config, samples=N, tokens=int(likely.sum()), worst_sigma=sigma[likely].max().item())


def lora(config: Config) -> None:
    """Three steps of the LoRA recipe with train_grpo.py, timed by phase, with one checkpoint."""
    prompts = 2 if config.tiny else 16
    started = time.perf_counter()
    model = make_model(config)
    benchmark.write_task(model, config.folder, prompts)
    benchmark.free(model)  # train_grpo.py runs in a process of its own, which needs the memory
    Path(config.folder, "complete").touch()
    write(config, seconds_to_write_the_model=time.perf_counter() - started)
    train(config, "lora", "")


def train(config: Config, run: str, flags: str) -> None:
    """Train three steps with these flags; write their metrics, and whether they start at the reference."""
    prompts, group_size, micro_batch = (2, 2, 1) if config.tiny else (16, 8, 4)
    settings = f"--prompts_per_step {prompts} --group_size {group_size} --micro_batch {micro_batch}"
    settings += " --max_steps 3 --max_new_tokens 12 --samples_every 0 --save_every 2"
    started = time.perf_counter()
    # if a flag is given twice, the last one counts
    lines = benchmark.train_steps(config.folder, run, f"{settings} {flags}")
    names = ("seconds_sample", "seconds_score", "seconds_update", "memory_gb", "kl", "grad_norm")
    for line in lines:
        write(config, step=line["step"], **{name: line[name] for name in names if name in line})
    checkpoint = Path(config.folder, run, "checkpoint-2", "state", "state.json")
    write(
        config,
        kl_at_step_0_is_0=lines[0]["kl"] == 0,
        saved=checkpoint.exists(),
        seconds_with_loading=time.perf_counter() - started,
    )


def qlora(config: Config) -> None:
    """The same steps with the README's flags for a 24 GB card."""
    if not importlib.util.find_spec("bitsandbytes"):
        return write(config, skipped="bitsandbytes is not installed")
    if not Path(config.folder, "complete").exists():
        raise BadInput("stage lora did not write the model")
    train(config, "qlora", "--load_in_4bit --gradient_checkpointing --micro_batch 1 --sample_batch 4")


def ratio(config: Config) -> None:
    """How many times longer the repeated way takes, for one prompt and for four."""
    G, clip_seconds, tokens = (2, 2, (3, 4)) if config.tiny else benchmark.SETTINGS[0]
    model = make_model(config)
    for prompts in (1, 4):
        # with four prompts the repeated way's activations do not fit on one card
        found = benchmark.compare(model, G, clip_seconds, tokens, 1, prompts, updates=prompts == 1)
        write(config, **found)


def fsdp(config: Config) -> None:
    """FSDP2 over NCCL in one process, on the toy's model: four steps, then resuming after two of them.

    On a CPU accelerate has no FSDP2, so the steps run without it.
    """
    folder = Path(config.folder, "fsdp")
    folder.mkdir()
    toy.make_data(folder, "train", 8, seed=1)
    toy.make_model(folder / "model", seed=0)
    command = [sys.executable]
    if device() == "cuda":
        launcher = "-m accelerate.commands.launch --num_processes 1 --config_file"
        command += [*launcher.split(), str(ROOT / "fsdp.yaml")]
    command += [benchmark.write_script(str(folder)), "--model", str(folder / "model")]
    command += ["--data", str(folder / "train.jsonl"), "--output", str(folder / "run")]
    flags = "--prompts_per_step 2 --group_size 2 --max_new_tokens 5 --max_steps 4 --save_every 2"
    command += [*flags.split(), "--keep_states", "9", "--lr", "1e-3"]

    subprocess.run(command, check=True)
    first = read_losses(folder / "run")
    # make the finished run look like one that stopped after two steps
    (folder / "run" / "config.json").unlink()
    for path in (folder / "run").glob("checkpoint-4*"):
        shutil.rmtree(path)
    subprocess.run([*command, "--resume", "True"], check=True)
    again = read_losses(folder / "run")
    differences = [abs(a - b) for a, b in zip(first, again)]
    write(config, fsdp2=device() == "cuda", losses=first, differences_after_resuming=differences[2:])


def read_losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def decode(config: Config) -> None:
    """Seconds per sampled token, without adapters."""
    G, T = (2, 6) if config.tiny else (8, 34)
    model = make_model(config)
    for prompts in (1, 2 if config.tiny else 16):
        inputs, _, _ = benchmark.make_group(model, prompts, G, 10, (2, 2))
        times = {}
        for tokens in (2, T):
            benchmark.shared_sample(model, inputs, G, tokens)  # warm-up
            times[tokens] = benchmark.seconds(benchmark.shared_sample, model, inputs, G, tokens)
        per_token = (times[T] - times[2]) / (T - 2)
        write(config, prompts=prompts, group_size=G, seconds_a_token=per_token)


# most useful first: the function, and its limit in seconds
STAGES = {
    "card": (card, 40),
    "agreement": (agreement, 40),
    "distribution": (distribution, 30),
    "lora": (lora, 130),
    "qlora": (qlora, 80),
    "ratio": (ratio, 60),
    "fsdp": (fsdp, 70),
    "decode": (decode, 40),
}


# ---------------------------------------------------------------- running them


def run_stage(config: Config, name: str, seconds: float) -> None:
    """Run a stage in its own process; write how it ended and how long it took."""
    command = [sys.executable, "-m", "tools.trial", "--stage", name, "--output", config.output]
    command += ["--folder", config.folder, "--tiny", str(config.tiny)]
    started = time.perf_counter()
    with open(f"{config.output}.log", "ab") as log:
        # in a session of its own, so that killing it also ends the processes it starts
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
        try:
            ended = f"exit status {process.wait(timeout=seconds)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    config.stage = name
    write(config, ended=ended, seconds=round(time.perf_counter() - started, 1))


def main() -> None:
    config = parse(Config, __doc__)
    config.output = os.path.abspath(config.output)
    if config.stage:
        if config.stage not in STAGES:
            raise BadInput(f"--stage {config.stage}: unknown, choose from {', '.join(STAGES)}")
        return STAGES[config.stage][0](config)
    if not config.tiny and not torch.cuda.is_available():
        raise BadInput("there is no CUDA GPU; --tiny tries the stages without one")
    for path in (config.output, f"{config.output}.log"):
        Path(path).unlink(missing_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as config.folder:
        for name, (_, limit) in STAGES.items():
            left = TOTAL_SECONDS - (time.perf_counter() - started)
            if left < 20 and not config.tiny:
                config.stage = name
                write(config, ended="not started: no time left")
                continue
            run_stage(config, name, 600 if config.tiny else min(limit, left))


if __name__ == "__main__":
    run_main(main)
