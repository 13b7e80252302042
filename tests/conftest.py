"""Shared by the tests: a small toy, settings for short runs, what a run wrote, two processes on a CPU."""

import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import toy  # noqa: E402
from data import load_audio, make_inputs  # noqa: E402
from data import load_examples as load_with_hash  # noqa: E402
from model import load_model  # noqa: E402

torch.set_num_threads(2)


def pytest_configure(config):
    """Hide GPUs from all but the GPU tests: results on a CPU are compared bit for bit."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


OWN = {"audio": "a.wav", "question": "What is in the video?", "choices": ["dog", "cat"], "answer": "cat"}
CONVERTED = {
    "video_name": "x_000030",
    "audio_path": "a.wav",
    "question_text": "What is in the video?",
    "multi_choice": ["dog", "cat"],
    "answer": 1,
}


NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 32_000).astype(np.float32)
NOISE_THEN_SILENCE = np.concatenate([NOISE, np.zeros(320_000, np.float32)])


def mp3(samples):
    """An MP3 file with variable bit rate, whose first frame gives the length."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="MP3")
    return file.getvalue()


def without_length(content):
    """The same MP3 without that frame."""
    return content[content.index(content[:2], 10) :]


def write(path, rows, as_list=False):
    """Rows as JSON Lines or as a JSON list; returns the path as text."""
    path.write_text(json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load_examples(*args, **flags):
    """data.load_examples without the hash of the file."""
    return load_with_hash(*args, **flags)[0]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small toy: 24 training and 12 test questions, and a model that has learned nothing yet."""
    path = tmp_path_factory.mktemp("toy")
    toy.make_data(path, "train", 24, seed=1)
    toy.make_data(path, "test", 12, seed=2)
    toy.make_model(path / "model", seed=0)
    return path


@pytest.fixture
def toy_model(folder):
    model, processor = load_model(str(folder / "model"), torch.float32)
    return model.eval(), processor


@pytest.fixture(scope="session")
def examples(folder):
    """Questions of unequal length about clips of unequal length."""
    return load_examples(str(folder / "train.jsonl"))


# An untrained model is never right; rewarding odd lengths gives a step something to learn.
def odd_length(completion, *_):
    return float(len(completion) % 2)


# Adam would turn the rounding of near-zero gradients into steps of full size.
def sgd(parameters, lr, weight_decay, fused=False):
    return torch.optim.SGD(parameters, lr)


@pytest.fixture
def reward_odd_lengths(monkeypatch):
    monkeypatch.setattr("train_grpo.accuracy_reward", odd_length)
    monkeypatch.setattr("evaluate.mmau_match", odd_length)


@pytest.fixture
def plain_sgd(monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", sgd)


# ---------------------------------------------------------------- model inputs


def inputs_of(processor, examples, prompt="answer"):
    return make_inputs(processor, examples, [load_audio(example.audio) for example in examples], prompt)


def random_completions(lengths, seed=0):
    """Random tokens as ids and mask (B, G, T), from lengths [B][G]; the filler is a real token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    ids = torch.randint(10, 300, (*lengths.shape, int(lengths.max())), generator=generator)
    return ids, torch.arange(ids.shape[-1]) < lengths[..., None]


# ---------------------------------------------------------------- short runs


def config(script, folder, output, **flags):
    """Settings for a two-step run of `script`."""
    files = dict(model=str(folder / "model"), data=str(folder / "train.jsonl"), output=str(output))
    short = dict(prompts_per_step=4, max_new_tokens=5, max_steps=2, lr=1e-2)
    group = dict(group_size=4) if script == "train_grpo" else {}
    return importlib.import_module(script).Config(**files | short | group | flags)


def run_script(script, folder, output, **flags):
    """Do such a run in this process."""
    importlib.import_module(script).train(config(script, folder, output, **flags))


@pytest.fixture
def run_evaluate(monkeypatch):
    """Run evaluate.py with flags, in this process."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        importlib.import_module("evaluate").main()

    return run


def metrics(output):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in open(Path(output) / "metrics.jsonl")]


def weights(output):
    """The tensors of the model or adapters that a run saved."""
    name = "adapter_model" if (Path(output) / "adapter_config.json").exists() else "model"
    return load_file(Path(output) / f"{name}.safetensors")


def assert_same_run(one, two, exact=False):
    """Metrics except timings, and weights, are equal: bit for bit, or up to rounding."""
    lines_one, lines_two = (
        [{name: value for name, value in line.items() if "seconds" not in name} for line in metrics(output)]
        for output in (one, two)
    )
    weights_one, weights_two = weights(one), weights(two)
    assert weights_one.keys() == weights_two.keys()
    assert any(line.get("grad_norm", 0) > 0.01 for line in lines_one)
    if exact:
        assert lines_one == lines_two
        assert all(torch.equal(weights_one[name], weights_two[name]) for name in weights_one)
        return
    for a, b in zip(lines_one, lines_two, strict=True):
        assert a.keys() == b.keys()
        for name in a:  # clipping hides the size of the gradient from the weights, but not from grad_norm
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
    for name in weights_one:
        assert torch.allclose(weights_one[name], weights_two[name], atol=1e-6), name


# ---------------------------------------------------------------- several processes

TWO = "--multi_gpu --num_processes 2 --num_machines 1 --dynamo_backend no --main_process_port 0"
# accelerate supports FSDP2 on accelerators only; these two values make it take a CPU for one
FSDP2_ON_CPU = """
from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
"""
# a gloo thread that is still alive when Python exits can abort the process
NO_GLOO_THREADS = """
import os
for thread in os.listdir("/proc/self/task") if os.path.exists("/proc/self/task") else []:
    try:
        name = open(f"/proc/self/task/{thread}/comm").read()
    except OSError:  # it has just ended
        continue
    assert "gloo" not in name, name
"""
# FSDP2 keeps gloo's threads alive (its real runs use NCCL), so these tests skip Python's own clean-up
EXIT_AT_ONCE = """
import os, sys
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""
ODD_LENGTHS = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import evaluate, torch, train_grpo
from conftest import odd_length, sgd
train_grpo.accuracy_reward = evaluate.mmau_match = odd_length
"""
SGD = "torch.optim.AdamW = sgd\n"


def training_code(script, more=""):
    """Code that trains with the flags it is given, rewarding odd lengths."""
    start = f"import {script}; from cli import parse, run_main\n"
    return ODD_LENGTHS + more + start + f"run_main(lambda: {script}.train(parse({script}.Config, '')))\n"


def as_flags(config) -> list[str]:
    """The flags that give these settings."""
    flags = []
    for name, value in vars(config).items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)] if value else []
        elif value != "":
            flags.append(f"--{name}={value}")
    return flags


def launch(code: str, *flags, precision="no", fsdp=False, root=ROOT, options=()) -> None:
    """Run `code` in two processes with these flags, using the scripts in `root`.

    fsdp: use fsdp.yaml. options: for `accelerate launch`.
    """
    before = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "import training\n"  # imported after Accelerator(), torch.distributed.nn keeps the process group
        + (FSDP2_ON_CPU if fsdp else "")
        + "from accelerate import Accelerator\n"
        "assert Accelerator().num_processes == 2\n"  # without --multi_gpu accelerate silently starts one
        f"assert Accelerator().is_fsdp2 is {fsdp}\n"
    )
    after = EXIT_AT_ONCE if fsdp else NO_GLOO_THREADS
    sharded = ["--config_file", f"{ROOT}/fsdp.yaml", "--num_processes", "2", "--main_process_port", "0"]
    device = {"ACCELERATE_TORCH_DEVICE": "cpu"} if fsdp else {"ACCELERATE_USE_CPU": "true"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(f"{before}{code}\n{after}")
        script.flush()
        command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", precision]
        command += [*(sharded if fsdp else TWO.split()), *options, script.name, *map(str, flags)]
        done = subprocess.run(command, env=os.environ | device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
