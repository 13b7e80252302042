"""What only a GPU can show: `pytest -m gpu`. The other tests hide GPUs and run on the CPU anywhere."""

import os
import subprocess
import sys
import time

import benchmark
import pytest
import torch
from conftest import ROOT, as_flags, config, inputs_of, metrics, random_completions, run_script
from conftest import training_code

import training
from checkpoints import list_states
from model import repeated_logps, sample, shared_prompt_logps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def on_gpu(toy_model):
    model, processor = toy_model
    return model.to("cuda"), processor


def to_gpu(inputs):
    return {name: value.to("cuda") for name, value in inputs.items()}


def group(model, lengths, P):
    """Inputs of one prompt of P tokens, and completions of these lengths."""
    inputs, *_ = benchmark.make_group(model, 1, 1, 2, (1, 1))
    filler = torch.randint(10, 100, (1, P - inputs["input_ids"].shape[1]), device="cuda")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], filler], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    ids, mask = random_completions([lengths])
    return inputs, ids.to("cuda"), mask.to("cuda")


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("total", [192, 193, 200, 256, 320])  # 192 and 320 are 64 modulo 128
def test_shared_equals_repeated_with_gradients(dtype, tolerance, total):
    model = benchmark.make_model("small", "cuda", dtype)
    lengths = [10, 16, 12, 14]
    inputs, ids, mask = group(model, lengths, total - sum(lengths))

    def run(logps):
        model.zero_grad()
        found = logps(model, inputs, ids, mask, 1.0)
        found.sum().backward()
        return found.detach(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}

    (shared, grads), (plain, plain_grads) = run(shared_prompt_logps), run(repeated_logps)
    assert (shared - plain).abs().max() < tolerance
    for name, grad in plain_grads.items():
        assert grads[name].isfinite().all(), name
        assert (grads[name] - grad).norm() <= tolerance * grad.norm() + 1e-3, name


def test_first_tokens_follow_the_softmax(on_gpu, examples):
    model, processor = on_gpu
    inputs, N = to_gpu(inputs_of(processor, examples[:1])), 20_000
    noise = 1 - torch.rand(1, N, 1, generator=torch.Generator().manual_seed(0))
    ids, _ = sample(model, inputs, [0], 1, 0.5, noise.to("cuda"))
    p = torch.softmax(model(**inputs).logits[0, -1] / 0.5, -1)
    frequencies = torch.bincount(ids.flatten(), minlength=len(p)) / N
    assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / N).sqrt() + 1e-9).all()


def test_greedy_equals_the_models_own_generate(on_gpu, examples):
    model, processor = on_gpu
    inputs = to_gpu(inputs_of(processor, examples[3:7]))
    ids, _ = sample(model, inputs, [0], 12)
    plain = dict(do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0)
    theirs = model.generate(**inputs, max_new_tokens=12, eos_token_id=[0], pad_token_id=0, **plain)
    assert torch.equal(ids[:, 0], theirs[:, inputs["input_ids"].shape[1] :])


def train_elsewhere(script, flags, **environment):
    """A run in a process of its own, on the GPU or, told so, on the CPU; rewarding odd lengths."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + training_code(script)
    command = [sys.executable, "-c", code, *as_flags(flags)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def test_two_steps_equal_the_cpus_up_to_rounding(folder, tmp_path):
    for name, environment in (("gpu", {}), ("cpu", {"ACCELERATE_USE_CPU": "true"})):
        train_elsewhere("train_grpo", config("train_grpo", folder, tmp_path / name, lr=1e-4), **environment)
    for one, two in zip(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), strict=True):
        for name in ("reward", "completion_tokens", "loss", "kl", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-2, abs=1e-4), name


def test_lora_in_bf16_starts_at_the_reference(folder, tmp_path):
    flags = config("train_grpo", folder, tmp_path / "run", lora_rank=4, lr=0.1, max_steps=3)
    train_elsewhere("train_grpo", flags, ACCELERATE_MIXED_PRECISION="bf16")
    lines = metrics(tmp_path / "run")
    assert lines[0]["kl"] == 0 < lines[-1]["kl"]


def test_fsdp2_with_one_process_trains_saves_and_resumes(folder, tmp_path):
    code = tmp_path / "script.py"
    code.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + training_code("train_grpo"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{ROOT}/fsdp.yaml"]
    command += ["--num_processes", "1", str(code)]
    flags = config("train_grpo", folder, tmp_path / "run", max_steps=4, save_every=2, keep_states=9)
    subprocess.run([*command, *as_flags(flags)], check=True)
    whole = metrics(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    last = tmp_path / "run" / "checkpoint-4"
    last.rename(tmp_path / "moved")
    assert len(list_states(str(tmp_path / "run"))) == 1
    subprocess.run([*command, *as_flags(flags), "--resume=True"], check=True)
    for one, two in zip(whole, metrics(tmp_path / "run"), strict=True):
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=0.05)


def test_what_is_said_of_memory_is_what_is_allocated(folder, tmp_path, capsys):
    """Weights, gradients, AdamW and the reference of a run that has made its updates."""
    before = torch.cuda.memory_allocated()
    runs, plain = [], training.setup

    def setup(*args, **more):
        runs.append(plain(*args, **more))
        return runs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_grpo.setup", setup)
        run_script("train_grpo", folder, tmp_path / "run")
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    held = torch.cuda.memory_allocated() - before
    assert 0.9 < held / (4 * parameters * 4) < 1.3  # weights, two moments, reference; gradients are gone
    assert "reference" in capsys.readouterr().out


def test_new_shapes_cost_nothing_but_their_size():
    """No plan or graph is built for each: 50 steps of changing shapes against 50 of one shape."""
    model = benchmark.make_model("small", "cuda", torch.bfloat16)

    def seconds(totals):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for total in totals:
            inputs, ids, mask = group(model, [10, 16, 12, 14], total)
            shared_prompt_logps(model, inputs, ids, mask, 1.0).sum().backward()
            model.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds([300] * 5)
    same, changing = seconds([300] * 50), seconds(range(275, 325))
    assert changing < 1.5 * same, (changing, same)
