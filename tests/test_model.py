from types import SimpleNamespace

import benchmark
import pytest
import torch
from oracle import inputs_of

import model
from data import BadInput
from model import activations, check_memory, encode_audio, load_frozen
from train_grpo import shared_prompt_logps

ONE = SimpleNamespace(num_processes=1, device=torch.device("cpu"), is_fsdp2=False, mixed_precision="bf16", print=print)

# ----------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("frames", [[199], [200], [150, 61], [60, 61, 62, 63], [5, 12]], ids=str)
def test_the_encoder_runs_as_far_as_there_is_sound_and_says_the_same(toy_model, frames):
    policy, _ = toy_model
    tower, heard = policy.model.audio_tower, torch.tensor(frames)
    inputs = {"input_features": torch.randn(len(frames), 64, 200, generator=torch.Generator().manual_seed(0))}
    inputs["feature_attention_mask"] = (torch.arange(200) < heard[:, None]).long()
    convolved, pooled = tower._get_feat_extract_output_lengths(heard)
    mask = torch.arange(100) < convolved[:, None]
    plain = tower(inputs["input_features"], attention_mask=mask[:, None, None]).last_hidden_state  # the whole window
    ours = encode_audio(policy, inputs)
    assert ours.shape[1] == max(pooled)
    for b, n in enumerate(pooled):
        assert n > 0 and torch.allclose(ours[b, :n], plain[b, :n], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.fixture
def seven_billion():
    """The real configuration, without its weights."""
    return benchmark.make_model("7b", "meta")


def flags(**changed):
    return SimpleNamespace(**dict(prompts_per_step=16, micro_batch=1, gradient_checkpointing=False, lora_rank=0) | changed)


def test_a_run_that_does_not_fit_says_so_and_what_helps(seven_billion, monkeypatch):
    monkeypatch.setattr(model, "free_memory", lambda device: 80.0)
    with pytest.raises(BadInput, match="152.4 GB do not fit into the 80.0 GB .* --lora_rank 16, .*fsdp.yaml .* --beta 0$"):
        check_memory(ONE, seven_billion, flags(), 8 * 256, with_reference=True)
    with pytest.raises(BadInput) as error:
        check_memory(ONE, seven_billion, flags(), 8 * 256, with_reference=False)
    assert "134.3 GB" in str(error.value) and "--beta" not in str(error.value)


def test_a_run_whose_longest_batch_may_not_fit_warns(seven_billion, monkeypatch, capsys):
    eight = SimpleNamespace(**vars(ONE) | dict(num_processes=8, is_fsdp2=True))
    for room, warns in ((40.0, True), (80.0, False)):
        monkeypatch.setattr(model, "free_memory", lambda device, room=room: room)
        check_memory(eight, seven_billion, flags(), 8 * 256, with_reference=True)
        said = capsys.readouterr().out
        assert ("may not fit" in said) == warns == ("--gradient_checkpointing" in said)
        assert "sharded over 8 process(es)" in said and "weights 4.20, gradients 4.20, AdamW 8.40, reference 2.26" in said


def test_without_a_gpu_nothing_is_refused():
    assert model.free_memory(torch.device("cpu")) == float("inf")


@pytest.mark.parametrize("mixed_precision", ["bf16", "no"])
def test_the_reference_is_as_large_as_was_said(folder, toy_model, capsys, mixed_precision):
    accelerator = SimpleNamespace(**vars(ONE) | dict(mixed_precision=mixed_precision))
    reference, _ = load_frozen(SimpleNamespace(model=str(folder / "model")), accelerator)
    check_memory(accelerator, toy_model[0], flags(), 8, with_reference=True)
    size = sum(p.numel() * p.element_size() for p in reference.parameters()) / 1e9
    assert f"reference {size:.2f}" in capsys.readouterr().out
    layers = [layer for layer in toy_model[0].modules() if not list(layer.children())]
    said = sum(p.numel() * model.frozen_dtype(layer, accelerator).itemsize for layer in layers for p in layer.parameters())
    assert said == 1e9 * size


@pytest.mark.parametrize("mixed_precision", ["bf16", "no"])
def test_the_guess_of_activations_is_near_what_autograd_keeps(toy_model, examples, mixed_precision):
    policy, processor = toy_model
    inputs, G, T = inputs_of(processor, examples[4:5]), 4, 64
    inputs["feature_attention_mask"] = torch.ones_like(inputs["feature_attention_mask"])  # as long as is heard
    inputs["input_ids"] = torch.cat([inputs["input_ids"].new_full((1, 50), policy.config.audio_token_id), torch.full((1, 100), 7)], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    ids, mask = torch.randint(10, 300, (1, G, T)), torch.ones(1, G, T, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16, mixed_precision == "bf16"):
        size = benchmark.memory(policy.train(), lambda: shared_prompt_logps(policy, inputs, ids, mask, 1.0))
    accelerator = SimpleNamespace(**vars(ONE) | dict(mixed_precision=mixed_precision))
    guess, recomputed = (
        1e9 * activations(accelerator, policy, flags(prompts_per_step=1, gradient_checkpointing=choice), G * T) for choice in (False, True)
    )
    assert 0.7 < guess / size < 2  # it counts, besides, what the backward pass adds
    assert recomputed < guess
