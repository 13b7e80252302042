"""--load_in_4bit: a base in 4 bits, and adapters that are trained, saved, resumed, evaluated and merged.

The tests that need bitsandbytes are skipped without it: pip install bitsandbytes==0.50.2
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, as_flags, assert_same_run, config, inputs_of, launch, metrics, run_script
from conftest import training_code, weights
from torch import nn

from checkpoints import merge
from cli import BadInput
from model import load_model, repeated_logps, sample, sampling_noise, shared_prompt_logps, weights_hash

needs_bitsandbytes = pytest.mark.skipif(
    not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes"
)
QLORA = dict(lora_rank=4, load_in_4bit=True, lr=0.05, max_steps=5, save_every=2, keep_states=9)


@pytest.fixture
def four_bit_model(folder):
    return load_model(str(folder / "model"), four_bit_dtype=torch.float32)


@needs_bitsandbytes
def test_only_the_language_models_matrices_are_in_4_bits(four_bit_model):
    model, _ = four_bit_model
    in_4_bits = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    matrices = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("model.language_model.layers."):
            matrices.add(f"{name}.weight")
    assert in_4_bits == matrices and len(matrices) == 14
    rest = {p.dtype for name, p in model.named_parameters() if name not in in_4_bits}
    assert rest == {torch.float32}


@needs_bitsandbytes
def test_the_4_bit_model_answers_much_like_the_plain_one(folder, four_bit_model, examples):
    model, processor = four_bit_model
    plain, _ = load_model(str(folder / "model"))
    inputs = inputs_of(processor, examples[:3])
    with torch.no_grad():
        logits, plain_logits = model(**inputs).logits, plain(**inputs).logits
    similarity = torch.cosine_similarity(logits.flatten(), plain_logits.flatten(), dim=0)
    assert 0.9 < similarity < 0.9999


@needs_bitsandbytes
def test_sampling_does_not_remove_the_gradient(four_bit_model, examples):
    """On a CPU bitsandbytes packs weights in eval mode, after which they have no gradient."""
    model, processor = four_bit_model
    inputs = inputs_of(processor, examples[:2])
    before = weights_hash(model)
    ids, mask = sample(model.eval(), inputs, [0], 5, 1.0, sampling_noise(0, 0, 2, 3, 5))
    assert weights_hash(model) == before
    embeddings = model.get_input_embeddings().weight
    gradients = []
    for way in (shared_prompt_logps, repeated_logps):
        way(model.train(), inputs, ids, mask, 1.0).sum().backward()
        gradients.append(embeddings.grad.clone())
        embeddings.grad = None
    assert gradients[0].norm() > 1
    assert torch.allclose(*gradients, atol=1e-3)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run of five steps with the base in 4 bits."""
    output = tmp_path_factory.mktemp("four_bit") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_grpo.accuracy_reward", lambda text, *_: float(len(text) % 2))
        run_script("train_grpo", folder, output, **QLORA)
    return output


@needs_bitsandbytes
def test_training_starts_at_the_reference_and_saves_fp32_adapters(trained):
    lines = metrics(trained)
    assert len(lines) == 5
    assert lines[0]["kl"] == 0 < lines[-1]["kl"]
    assert all(line["grad_norm"] > 0 for line in lines)
    assert {weight.dtype for weight in weights(trained).values()} == {torch.float32}
    assert all("lora_" in name for name in weights(trained))


@needs_bitsandbytes
def test_a_resumed_run_is_the_same(folder, trained, tmp_path, reward_odd_lengths):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "run" / name).unlink()
    run_script("train_grpo", folder, tmp_path / "run", resume=True, **QLORA)
    assert_same_run(trained, tmp_path / "run", exact=True)
    (tmp_path / "run" / "adapter_config.json").unlink()
    with pytest.raises(BadInput, match=r"flags differ .*--load_in_4bit False \(was True\)"):
        run_script("train_grpo", folder, tmp_path / "run", resume=True, **QLORA | dict(load_in_4bit=False))


@needs_bitsandbytes
def test_adapters_are_evaluated_on_a_base_in_4_bits_or_not(folder, trained, tmp_path, run_evaluate):
    flags = ("--model", trained, "--data", folder / "test.jsonl", "--max_new_tokens", 5)
    hashes = []
    for name, more in {"plain": [], "4 bits": ["--load_in_4bit"], "again": ["--load_in_4bit"]}.items():
        run_evaluate(*flags, "--output", tmp_path / name, *more)
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["total"] == 12 and results["load_in_4bit"] == bool(more)
        hashes.append(results["weights_hash"])
    assert hashes[0] != hashes[1] == hashes[2]


@needs_bitsandbytes
def test_adapters_of_another_4_bit_base_are_refused(folder, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings | {"base_hash": "another"}))
    with pytest.raises(BadInput, match="does not have the weights that these adapters were trained on"):
        load_model(str(tmp_path / "run"), four_bit_dtype=torch.float32)


@needs_bitsandbytes
def test_adapters_are_merged_into_the_plain_base(folder, trained, tmp_path):
    merge(str(trained), str(tmp_path / "merged"))
    merged, _ = load_model(str(tmp_path / "merged"))
    base, _ = load_model(str(folder / "model"))
    name = "model.language_model.layers.0.mlp.up_proj"
    difference = merged.get_submodule(name).weight - base.get_submodule(name).weight
    adapters = weights(trained)
    A = adapters[f"base_model.model.{name}.lora_A.weight"]
    B = adapters[f"base_model.model.{name}.lora_B.weight"]
    assert torch.allclose(difference, B @ A * 32 / 4, atol=1e-5) and difference.norm() > 0.01


@needs_bitsandbytes
def test_both_trainings_in_bf16(folder, tmp_path):
    """As on a GPU: GRPO starts exactly at the reference."""
    for script, lr in (("train_sft", 0.05), ("train_grpo", 0.05)):
        settings = config(script, folder, tmp_path / script, **QLORA | dict(lr=lr, max_steps=3))
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + training_code(script)
        environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"}
        command = [sys.executable, "-c", code, *as_flags(settings)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    losses = [line["loss"] for line in metrics(tmp_path / "train_sft")]
    assert losses[-1] < losses[0]
    lines = metrics(tmp_path / "train_grpo")
    assert lines[0]["kl"] == 0 < lines[-1]["kl"]


# ---------------------------------------------------------------- without bitsandbytes


def test_without_bitsandbytes_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput) as error:
        load_model(str(folder / "model"), four_bit_dtype=torch.float32)
    assert str(error.value).endswith("--load_in_4bit needs bitsandbytes: pip install bitsandbytes")


def test_4_bits_without_adapters_are_refused(folder, tmp_path):
    with pytest.raises(BadInput, match="--load_in_4bit needs LoRA adapters"):
        run_script("train_sft", folder, tmp_path / "run", load_in_4bit=True)


@pytest.mark.slow
def test_4_bits_under_fsdp2_are_refused(folder, tmp_path):
    flags = as_flags(config("train_grpo", folder, tmp_path / "run", **QLORA))
    with pytest.raises(AssertionError, match="error: --load_in_4bit: FSDP2 cannot shard"):
        launch(training_code("train_grpo"), *flags, fsdp=True)
