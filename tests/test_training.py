"""What GRPO and SFT share: equal runs by different routes, batches prepared ahead, messages."""

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SGD, as_flags, assert_same_run, config, launch, load_examples, metrics, run_script
from conftest import training_code, weights

import data
import training
from cli import BadInput, run_main
from data import read_batch
from model import load_model
from training import read_batches

# script, flags of both runs, flags of the second
SAME = {
    "GRPO, 2 prompts a micro-batch": ("train_grpo", {}, dict(micro_batch=2)),
    "GRPO, all prompts together": ("train_grpo", {}, dict(micro_batch=4)),
    "GRPO, several updates": ("train_grpo", dict(num_iterations=2), dict(micro_batch=2)),
    "GRPO, activations recomputed": ("train_grpo", {}, dict(gradient_checkpointing=True)),
    "SFT, micro-batches": ("train_sft", {}, dict(micro_batch=2)),
    "SFT, all examples together": ("train_sft", {}, dict(micro_batch=4)),
}
TWO_PROCESSES = {  # script, flags, FSDP2
    "GRPO": ("train_grpo", {}, False),
    "GRPO with LoRA": ("train_grpo", dict(lora_rank=4), False),
    "SFT": ("train_sft", {}, False),
    "GRPO, FSDP2": ("train_grpo", {}, True),
    "GRPO with LoRA, FSDP2": ("train_grpo", dict(lora_rank=4), True),
    # adapters in FSDP2's root too, which stays gathered after the reference is scored
    "GRPO with LoRA on the projector, FSDP2": (
        "train_grpo",
        dict(lora_rank=4, train=["projector", "language"]),
        True,
    ),
    "SFT, FSDP2": ("train_sft", dict(train=["projector", "language"], gradient_checkpointing=True), True),
}
RECOMPUTED = {  # through accelerate's own setting
    "GRPO, FSDP2, activations recomputed": ("train_grpo", {}, True),
    "GRPO with LoRA, FSDP2, activations recomputed": ("train_grpo", dict(lora_rank=4), True),
}
ALL = TWO_PROCESSES | RECOMPUTED


@pytest.mark.parametrize("script, both, second", SAME.values(), ids=SAME)
def test_the_same_run(folder, tmp_path, reward_odd_lengths, plain_sgd, script, both, second):
    run_script(script, folder, tmp_path / "one", lr=0.1, **both)
    run_script(script, folder, tmp_path / "two", lr=0.1, **both, **second)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    before, after = weights(folder / "model"), weights(tmp_path / "one")
    assert max((after[name] - before[name]).abs().max() for name in before) > 1e-3  # it did learn


@pytest.mark.parametrize("flags", [dict(train=["projector", "language"]), dict(lora_rank=4)], ids=str)
def test_the_same_run_with_one_encoding_a_step(
    folder, tmp_path, monkeypatch, reward_odd_lengths, plain_sgd, flags
):
    run_script("train_grpo", folder, tmp_path / "once", lr=0.1, **flags)
    monkeypatch.setattr("train_grpo.encoder_is_frozen", lambda model: False)
    run_script("train_grpo", folder, tmp_path / "each time", lr=0.1, **flags)
    assert_same_run(tmp_path / "once", tmp_path / "each time")


@pytest.mark.slow
@pytest.mark.parametrize("name, script, flags, fsdp", [(name, *ALL[name]) for name in ALL], ids=ALL)
def test_the_same_run_in_two_processes(
    folder, tmp_path, reward_odd_lengths, plain_sgd, name, script, flags, fsdp
):
    (tmp_path / "odd.jsonl").write_text("".join(open(folder / "test.jsonl").readlines()[:11]))
    held_out = dict(eval_data=str(tmp_path / "odd.jsonl"), audio_dir=str(folder), eval_every=2)
    flags = flags | held_out | dict(lr=0.1, max_steps=4, save_every=2)
    run_script(script, folder, tmp_path / "one", **flags)
    two = config(script, folder, tmp_path / "two", **flags)
    options = ["--fsdp_activation_checkpointing", "true"] if name in RECOMPUTED else []
    launch(training_code(script, SGD), *as_flags(two), fsdp=fsdp, options=options)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    load_model(str(tmp_path / "two"))  # refuses names that are not the model's
    if script == "train_grpo":
        rows, rows_of_two = (open(tmp_path / name / "samples.jsonl").readlines() for name in ("one", "two"))
        assert len(rows) == 8 and rows == rows_of_two
    one, two = (weights(tmp_path / name / "checkpoint-2") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    accuracies = [line["eval_accuracy"] for line in metrics(tmp_path / "one") if "eval_accuracy" in line]
    assert len(accuracies) == 3 and all(0 < accuracy < 1 for accuracy in accuracies)


@pytest.mark.parametrize("script", ["train_grpo", "train_sft"])
def test_the_same_seed_gives_the_same_run(folder, tmp_path, reward_odd_lengths, script):
    for name in ("a", "b"):
        run_script(script, folder, tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b", exact=True)


UNSUPPORTED = {  # what accelerate was told, by its configuration or by the environment
    "dynamo": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "accelerate's dynamo_backend must be no"),
    "accumulation": (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        "accelerate's gradient_accumulation_steps must be 1: use --micro_batch instead",
    ),
    "fp16": ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16"),
}


@pytest.mark.parametrize("environment, says", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_accelerate_is_told_is_supported_or_refused(folder, tmp_path, environment, says):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + training_code("train_grpo")
    flags = as_flags(config("train_grpo", folder, tmp_path / "run"))
    command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert says in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, says",
    [
        (["--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP"], "must be TRANSFORMER_BASED_WRAP"),
        (["--fsdp_offload_params", "true"], "fsdp_offload_params and .* must be false"),
    ],
    ids=str,
)
def test_other_settings_of_fsdp2_are_refused(folder, tmp_path, options, says):
    flags = as_flags(config("train_grpo", folder, tmp_path / "run"))
    with pytest.raises(AssertionError, match=says):
        launch(training_code("train_grpo"), *flags, fsdp=True, options=options)


def test_weights_under_other_names_are_not_saved(folder, tmp_path, monkeypatch):
    """As if accelerate had wrapped a layer and so renamed its weights: nobody could load that."""
    plain = Accelerator.get_state_dict

    def renamed(*args):
        return {f"_orig_mod.{name}": weight for name, weight in plain(*args).items()}

    monkeypatch.setattr(Accelerator, "get_state_dict", renamed)
    with pytest.raises(BadInput, match="66 weights are missing from the state, first lm_head.weight"):
        run_script("train_sft", folder, tmp_path / "run", max_steps=1)
    assert not (tmp_path / "run" / "config.json").exists()


def test_completions_that_do_not_end_are_reported_once(folder, tmp_path, capsys):
    run_script("train_grpo", folder, tmp_path / "run")
    assert capsys.readouterr().out.count("more than half of the completions are cut off") == 1


# ---------------------------------------------------------------- batches, messages


def test_a_batch_is_prepared_while_the_current_one_is_used(
    folder, tmp_path, toy_model, examples, monkeypatch
):
    began = [threading.Event() for _ in range(3)]

    def read(*args):
        began[args[3] // 4].set()
        return read_batch(*args)

    monkeypatch.setattr(training, "read_batch", read)
    accelerator = SimpleNamespace(process_index=0, device=torch.device("cpu"))
    run = SimpleNamespace(config=config("train_grpo", folder, tmp_path), accelerator=accelerator, prompts=4)
    run.processor, run.examples, run.first_step, run.max_steps = toy_model[1], examples, 0, 3
    batches = read_batches(run)
    for step in range(3):
        batch = next(batches)
        assert batch.first == 4 * step and len(batch.examples) == 4
        assert step == 2 or began[step + 1].wait(30)  # although nobody has asked for it yet
        assert step > 0 or not began[2].is_set()  # and only one is prepared ahead
    assert next(batches, None) is None


def test_a_bad_clip_stops_the_run_at_its_own_step(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "train")
    rows = [json.loads(line) for line in open(folder / "train.jsonl")][:4]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = data.stream_indices(4, 42, 2, 2)[0]
    (tmp_path / rows[second]["audio"]).write_text("not a sound")
    with pytest.raises(BadInput, match=f"train.jsonl:{second + 1}: "):
        flags = dict(data=str(tmp_path / "train.jsonl"), prompts_per_step=2)
        run_script("train_grpo", folder, tmp_path / "run", **flags)
    assert len(metrics(tmp_path / "run")) == 1


def test_a_bad_row_is_replaced_however_often_it_comes_up(folder, tmp_path, toy_model, capsys):
    """The batch hits more bad clips than there are rows, but half of the rows can be read."""
    rows = load_examples(str(folder / "train.jsonl"))[:4]
    examples = [replace(row, audio=str(tmp_path / "no.wav")) for row in rows[:2]] + rows[2:]
    settings = config("train_grpo", folder, tmp_path, prompts_per_step=32, skip_bad_audio=True)
    batch = read_batch(toy_model[1], examples, settings, 0, 32)
    assert {example.location for example in batch.examples} == {example.location for example in examples[2:]}
    # the row after the first bad one is bad as well
    assert batch.metrics["clips_skipped"] == (8 * 2 + 8 * 1) / 32
    with pytest.raises(BadInput, match="no such audio file"):
        read_batch(toy_model[1], examples[:2], settings, 0, 32)


def test_a_full_gpu_ends_in_one_line_with_the_flags_that_help():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")

    with pytest.raises(SystemExit) as stop:
        run_main(full)
    message = str(stop.value)
    assert message.startswith("error: the GPU is out of memory") and "--micro_batch" in message
    assert "\n" not in message


def test_the_start_says_how_many_parameters_are_trained(folder, tmp_path, capsys, toy_model):
    run_script("train_grpo", folder, tmp_path / "all", max_steps=1)
    run_script("train_grpo", folder, tmp_path / "lora", max_steps=1, lora_rank=4)
    n = sum(p.numel() for p in toy_model[0].parameters())
    every, lora = [line for line in capsys.readouterr().out.splitlines() if "M parameters" in line]
    assert every == f"{n / 1e6:.1f} M parameters, {n / 1e6:.1f} M trained"
    assert lora.endswith("0.0 M trained")


def test_a_gpu_that_is_not_used_is_reported(monkeypatch, capsys):
    accelerator = SimpleNamespace(print=print, device=torch.device("cpu"))
    monkeypatch.setattr("os.path.exists", lambda path: path.startswith("/proc/driver/nvidia"))
    training.warn_about_gpu(accelerator)
    assert capsys.readouterr().out == ""  # the tests hide GPUs on purpose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    training.warn_about_gpu(accelerator)
    assert "this machine has a GPU that is not used" in capsys.readouterr().out
