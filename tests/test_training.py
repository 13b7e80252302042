import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from oracle import inputs_of
from test_train_grpo import config, metrics

import train_grpo
import training
from data import BadInput
from train_grpo import shared_prompt_logps
from training import activations, batches, check_memory, load_frozen, read_batch

ONE = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"), is_fsdp2=False, mixed_precision="bf16", print=print)

# ----------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_prepared_while_the_one_before_is_used(folder, tmp_path, toy_model, examples, monkeypatch):
    began = [threading.Event() for _ in range(3)]

    def read(*args):
        began[args[-1] // 4].set()
        return read_batch(*args)

    monkeypatch.setattr(training, "read_batch", read)
    settings = config(folder, tmp_path)
    data = batches(ONE, toy_model[1], examples, settings, range(3))
    for step in range(3):
        first, batch, inputs, _ = next(data)
        assert first == 4 * step and len(batch) == 4
        assert step == 2 or began[step + 1].wait(30)  # nobody has asked for it
        assert step > 0 or not began[2].is_set()  # and one ahead is enough
        plain = inputs_of(toy_model[1], batch)
        assert all(torch.equal(inputs[name], plain[name]) for name in plain)
    assert next(data, None) is None


def test_a_bad_clip_stops_the_run_at_its_own_step(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "train")
    rows = [json.loads(line) for line in open(folder / "train.jsonl")][:4]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config(folder, tmp_path / "run", data=str(tmp_path / "train.jsonl"), prompts_per_step=2)
    second = training.stream_indices(4, settings.seed, 2, 2)[0]
    (tmp_path / rows[second]["audio"]).write_text("not a sound")
    with pytest.raises(BadInput, match=f"train.jsonl:{second + 1}: "):
        train_grpo.train(settings)
    assert len(metrics(tmp_path / "run")) == 1


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.fixture
def seven_billion():
    """The real configuration, without its weights."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2Config

    text = Qwen2Config(vocab_size=156032, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    text.num_key_value_heads = 32
    with torch.device("meta"):
        return Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(text_config=text))


def flags(**changed):
    return SimpleNamespace(**dict(prompts_per_step=16, micro_batch=1, gradient_checkpointing=False, lora_rank=0) | changed)


def test_a_run_that_does_not_fit_says_so_and_what_helps(seven_billion, monkeypatch):
    monkeypatch.setattr(training, "free_memory", lambda device: 80.0)
    with pytest.raises(BadInput, match="152.4 GB do not fit into the 80.0 GB .* --lora_rank 16, .*fsdp.yaml .* --beta 0$"):
        check_memory(ONE, seven_billion, flags(), 8 * 256, with_reference=True)
    with pytest.raises(BadInput) as error:
        check_memory(ONE, seven_billion, flags(), 8 * 256, with_reference=False)
    assert "134.3 GB" in str(error.value) and "--beta" not in str(error.value)


def test_a_run_whose_longest_batch_may_not_fit_warns(seven_billion, monkeypatch, capsys):
    eight = SimpleNamespace(**vars(ONE) | dict(num_processes=8, is_fsdp2=True))
    for room, warns in ((40.0, True), (80.0, False)):
        monkeypatch.setattr(training, "free_memory", lambda device, room=room: room)
        check_memory(eight, seven_billion, flags(), 8 * 256, with_reference=True)
        said = capsys.readouterr().out
        assert ("may not fit" in said) == warns == ("--gradient_checkpointing" in said)
        assert "sharded over 8 process(es)" in said and "weights 4.20, gradients 4.20, AdamW 8.40, reference 2.26" in said


def test_without_a_gpu_nothing_is_refused():
    assert training.free_memory(torch.device("cpu")) == float("inf")


@pytest.mark.parametrize("mixed_precision", ["bf16", "no"])
def test_the_reference_is_as_large_as_was_said(folder, toy_model, capsys, mixed_precision):
    accelerator = SimpleNamespace(**vars(ONE) | dict(mixed_precision=mixed_precision))
    model, _ = load_frozen(SimpleNamespace(model=str(folder / "model")), accelerator)
    check_memory(accelerator, toy_model[0], flags(), 8, with_reference=True)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    assert f"reference {size:.2f}" in capsys.readouterr().out
    layers = [layer for layer in toy_model[0].modules() if not list(layer.children())]
    said = sum(p.numel() * training.frozen_dtype(layer, accelerator).itemsize for layer in layers for p in layer.parameters())
    assert said == 1e9 * size


@pytest.mark.parametrize("mixed_precision", ["bf16", "no"])
def test_the_guess_of_activations_is_near_what_autograd_keeps(toy_model, examples, mixed_precision):
    model, processor = toy_model
    inputs, G, T, kept = inputs_of(processor, examples[4:5]), 4, 64, {}
    inputs["feature_attention_mask"] = torch.ones_like(inputs["feature_attention_mask"])  # as long as is heard
    inputs["input_ids"] = torch.cat([inputs["input_ids"].new_full((1, 50), model.config.audio_token_id), torch.full((1, 100), 7)], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, mixed_precision == "bf16"):
        shared_prompt_logps(model, inputs, torch.randint(10, 300, (1, G, T)), torch.ones(1, G, T, dtype=torch.bool), 1.0)
    size = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    accelerator = SimpleNamespace(**vars(ONE) | dict(mixed_precision=mixed_precision))
    guess, recomputed = (
        1e9 * activations(accelerator, model, flags(prompts_per_step=1, gradient_checkpointing=choice), G * T) for choice in (False, True)
    )
    assert 0.7 < guess / size < 2  # it counts, besides, what the backward pass adds
    assert recomputed < guess


def test_a_full_gpu_is_said_in_one_line(monkeypatch):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")

    with pytest.raises(SystemExit) as stop:
        training.run(full)
    assert str(stop.value).startswith("error: the GPU's memory is full") and "--micro_batch" in str(stop.value)
    assert "\n" not in str(stop.value)
