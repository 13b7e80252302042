"""Tests that need a GPU: `pytest -m gpu`. The other tests hide GPUs and always run on the CPU."""

import gc
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, as_flags, config, inputs_of, metrics, random_completions, training_code

from checkpoints import list_states
from model import repeated_logps, sample, shared_prompt_logps
from tools import benchmark

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def on_gpu(toy_model):
    model, processor = toy_model
    return model.to("cuda"), processor


def to_gpu(inputs):
    return {name: value.to("cuda") for name, value in inputs.items()}


def make_group(model, lengths, P):
    """Inputs for one prompt of P tokens with a 2 s clip, and completions of these lengths."""
    inputs, _, _ = benchmark.make_group(model, 1, 1, 2, (1, 1))
    filler = torch.randint(10, 100, (1, P - inputs["input_ids"].shape[1]), device="cuda")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], filler], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    ids, mask = random_completions([lengths])
    return inputs, ids.to("cuda"), mask.to("cuda")


# ---------------------------------------------------------------- the model


@pytest.fixture
def exact_fp32(monkeypatch):
    """fp32 without TF32, which convolutions use by default: the two ways would differ by its rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("total", [192, 193, 200, 256, 320])  # 192 and 320 are 64 modulo 128
def test_shared_equals_repeated_with_gradients(exact_fp32, total):
    """In fp32. In bf16 the repeated way is not exact either, so both are compared with fp32."""
    model = benchmark.make_model("small", "cuda", torch.float32)
    lengths = [10, 16, 12, 14]
    inputs, ids, mask = make_group(model, lengths, total - sum(lengths))

    def logps_and_gradients(way):
        model.zero_grad()
        logps = way(model, inputs, ids, mask, 1.0)
        logps.sum().backward()
        gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
        return logps.detach().float(), gradients

    truth, true_gradients = logps_and_gradients(repeated_logps)
    shared, gradients = logps_and_gradients(shared_prompt_logps)
    assert (shared - truth).abs().max() < 1e-4
    for name, gradient in true_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-3, name

    model.to(torch.bfloat16)
    repeated, repeated_gradients = logps_and_gradients(repeated_logps)
    shared, gradients = logps_and_gradients(shared_prompt_logps)
    assert (shared - truth).abs().max() < 2 * (repeated - truth).abs().max() + 0.01
    for name, gradient in true_gradients.items():
        error = (gradients[name] - gradient).norm()
        repeated_error = (repeated_gradients[name] - gradient).norm()
        assert error <= 2 * repeated_error + 0.02 * gradient.norm() + 1e-3, name  # false for nan


def test_first_tokens_follow_the_softmax(on_gpu, exact_fp32, examples):
    model, processor = on_gpu
    inputs = to_gpu(inputs_of(processor, examples[:1]))
    N = 20_000
    noise = 1 - torch.rand(1, N, 1, generator=torch.Generator().manual_seed(0))
    ids, _ = sample(model, inputs, [0], 1, 0.5, noise.to("cuda"))
    p = torch.softmax(model(**inputs).logits[0, -1] / 0.5, -1)
    frequencies = torch.bincount(ids.flatten(), minlength=len(p)) / N
    deviation = (p * (1 - p) / N).sqrt()
    assert ((frequencies - p).abs() <= 5 * deviation + 1e-9).all()


def test_greedy_equals_the_models_own_generate(on_gpu, exact_fp32, examples):
    model, processor = on_gpu
    inputs = to_gpu(inputs_of(processor, examples[3:7]))
    ids, _ = sample(model, inputs, [0], 12)
    plain = dict(do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0)
    theirs = model.generate(**inputs, max_new_tokens=12, eos_token_id=[0], pad_token_id=0, **plain)
    assert torch.equal(ids[:, 0], theirs[:, inputs["input_ids"].shape[1] :])


def test_the_benchmarks_process_leaves_the_memory_to_the_next():
    """Except for CUDA's own and cuBLAS's workspaces, which torch keeps until a process ends."""
    warm = torch.ones(8, 8, device="cuda")
    warm @ warm
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = benchmark.make_model("small", "cuda", torch.float32)
    inputs, ids, mask = make_group(model, [10, 16, 12, 14], 200)
    shared_prompt_logps(model, inputs, ids, mask, 1.0).sum().backward()
    weights = torch.cuda.memory_allocated()
    benchmark.free(model)
    assert torch.cuda.memory_reserved() - before < min(64e6, weights / 2)


def test_new_shapes_take_no_extra_time():
    """No plan or graph is built for a new shape: 50 steps of changing shapes against 50 of one shape."""
    model = benchmark.make_model("small", "cuda", torch.bfloat16)

    def seconds(prompt_lengths):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for P in prompt_lengths:
            inputs, ids, mask = make_group(model, [10, 16, 12, 14], P)
            shared_prompt_logps(model, inputs, ids, mask, 1.0).sum().backward()
            model.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds(range(200, 250))  # warm-up, with shapes that are not measured
    same = seconds([300] * 50)
    changing = seconds(range(275, 325))
    assert changing < 1.5 * same, (changing, same)


# ---------------------------------------------------------------- training


def train_in_process(script, settings, **environment):
    """Train in a new process, which sees the environment from its start; odd lengths are rewarded."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + training_code(script)
    command = [sys.executable, "-c", code, *as_flags(settings)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def test_two_steps_equal_those_on_the_cpu_up_to_rounding(folder, tmp_path):
    no_tf32 = {"NVIDIA_TF32_OVERRIDE": "0"}
    for name, environment in (("gpu", no_tf32), ("cpu", {"ACCELERATE_USE_CPU": "true"})):
        train_in_process("train_grpo", config("train_grpo", folder, tmp_path / name, lr=1e-4), **environment)
    for gpu_line, cpu_line in zip(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), strict=True):
        for name in ("reward", "completion_tokens", "loss", "kl", "grad_norm"):
            assert gpu_line[name] == pytest.approx(cpu_line[name], rel=1e-2, abs=1e-4), name


def test_lora_in_bf16_starts_at_the_reference(folder, tmp_path):
    settings = config("train_grpo", folder, tmp_path / "run", lora_rank=4, lr=0.1, max_steps=3)
    train_in_process("train_grpo", settings, ACCELERATE_MIXED_PRECISION="bf16")
    lines = metrics(tmp_path / "run")
    assert lines[0]["kl"] == 0 < lines[-1]["kl"]


def test_fsdp2_with_one_process_trains_saves_and_resumes(folder, tmp_path):
    code = tmp_path / "script.py"
    code.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + training_code("train_grpo"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/fsdp.yaml"]
    command += ["--num_processes", "1", str(code)]
    settings = config("train_grpo", folder, tmp_path / "run", max_steps=4, save_every=2, keep_states=9)
    subprocess.run([*command, *as_flags(settings)], check=True)
    uninterrupted = metrics(tmp_path / "run")

    # make the finished run look like one that stopped after two steps
    (tmp_path / "run" / "config.json").unlink()
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "moved")
    assert len(list_states(str(tmp_path / "run"))) == 1
    subprocess.run([*command, *as_flags(settings), "--resume=True"], check=True)
    resumed = metrics(tmp_path / "run")
    assert [line["step"] for line in resumed] == [0, 1, 2, 3]
    # on a GPU a gather's backward adds in no fixed order, so only the first loss after resuming is the same
    assert resumed[2]["loss"] == pytest.approx(uninterrupted[2]["loss"], abs=1e-6)
    assert resumed[3]["loss"] == pytest.approx(uninterrupted[3]["loss"], abs=5e-3)
