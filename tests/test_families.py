"""A tiny random model of every supported kind against its own plain forward."""

import importlib
import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SGD, as_flags, assert_same_run, config, inputs_of, launch, metrics
from conftest import random_completions, run_script, training_code
from families import NAMES, make, make_omni, without_torchvision
from safetensors.torch import load_file, save_file

import evaluate
import toy
import train_grpo
import train_sft
from cli import BadInput
from data import SAMPLE_RATE, is_cut, load_audio, make_inputs, read_clip, select_rows, window_size
from model import FAMILIES, Policy, encode_audio, encoder_is_frozen, eos_tokens, load_model, load_policy
from model import load_processor, load_reference, repeated_logps, sample, shared_prompt_logps

LENGTHS = [[3, 7, 1], [2, 9, 4]]  # in tokens: the completions of two prompts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each family that a test has asked for, and its class."""
    return {}


@pytest.fixture(params=NAMES)
def family(request, folders, folder, tmp_path_factory, monkeypatch):
    """Folder of questions and a tiny model, and the model's class."""
    without_torchvision(monkeypatch)
    if request.param not in folders:
        path = tmp_path_factory.mktemp(request.param)
        for name in ("train.jsonl", "test.jsonl", "train", "test"):
            if (folder / name).exists():
                (path / name).symlink_to(folder / name)
        (path / "model").mkdir()
        folders[request.param] = SimpleNamespace(
            name=request.param, folder=path, kind=make(request.param, path / "model")
        )
    return folders[request.param]


def pairs(flags):
    """(name, value) pairs from flags as typed on the command line."""
    words = flags.split()
    return [(name.removeprefix("--"), value) for name, value in zip(words[::2], words[1::2])]


def load(family):
    model, processor = load_model(str(family.folder / "model"), torch.float32)
    return model.eval(), processor


def gradients(model, logps):
    model.zero_grad()
    weight = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    (logps * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one, two):
    assert one.keys() == two.keys()
    for name, grad in one.items():
        assert torch.allclose(two[name], grad, rtol=1e-4, atol=1e-5 * max(1, grad.abs().max())), name


def test_log_probs_and_gradients_are_those_of_its_plain_forward(family, examples):
    """Clips, prompts and completions of unequal length; one completion contains the placeholder."""
    model, processor = load(family)
    placeholder, twin = model.config.audio_token_id, 40
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.lm_head.weight):
            table[placeholder] = table[twin]
    inputs = inputs_of(processor, examples[4:6])
    prompts = inputs["attention_mask"].sum(1)
    assert prompts[0] != prompts[1]
    ids, mask = random_completions(LENGTHS)
    ids[ids == placeholder] = twin
    ids[0, 1, 2] = twin
    plain = repeated_logps(model, inputs, ids, mask, 0.8)
    expected = gradients(model, plain)
    ids[0, 1, 2] = placeholder
    ours = shared_prompt_logps(model, inputs, ids, mask, 0.8)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    found = gradients(model, ours)
    # only these two tables tell the twins apart
    tables = {name for name in expected if "embed_tokens" in name or "lm_head" in name}
    for grads in (expected, found):
        for name in tables:
            grads[name][twin] += grads[name][placeholder]
            grads[name][placeholder] = 0
    assert_same_gradients(expected, found)
    assert any("audio_tower" in name for name in found)


def test_two_micro_batches_are_one(family, examples):
    model, processor = load(family)
    inputs = inputs_of(processor, examples[4:6])
    ids, mask = random_completions(LENGTHS)
    one = shared_prompt_logps(model, inputs, ids, mask, 1.0)
    halves = [slice(0, 1), slice(1, 2)]
    parts = [shared_prompt_logps(model, select_rows(inputs, r), ids[r], mask[r], 1.0) for r in halves]
    torch.testing.assert_close(torch.cat(parts), one, atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, one), gradients(model, torch.cat(parts)))


@torch.no_grad()
def test_a_prompt_does_not_depend_on_the_others_of_its_batch(family, examples):
    """Qwen3-Omni's processor and its encoder pad to the longest clip of a batch, which changes the others."""
    model, processor = load(family)
    waves = [load_audio(examples[0].audio)[: int(seconds * SAMPLE_RATE)] for seconds in (0.31, 0.8, 1.77, 2)]
    together = make_inputs(processor, [examples[0]] * len(waves), waves, "answer")
    encoded = encode_audio(model, together)
    for n, wave in enumerate(waves):
        row = select_rows(together, slice(n, n + 1))
        alone = make_inputs(processor, examples[:1], [wave], "answer")
        assert alone.keys() == row.keys() and all(torch.equal(alone[name], row[name]) for name in alone)
        torch.testing.assert_close(encode_audio(model, alone)[0], encoded[n], atol=1e-5, rtol=0)


def test_bf16_gives_about_the_same_log_probs(family, examples):
    model, processor = load(family)
    inputs = inputs_of(processor, examples[4:6])
    ids, mask = random_completions(LENGTHS)
    exact = shared_prompt_logps(model, inputs, ids, mask, 1.0)
    half = shared_prompt_logps(model.to(torch.bfloat16), inputs, ids, mask, 1.0)
    assert half.dtype == torch.float32 and 0 < (half - exact).abs().max() < 0.2
    sample(model, inputs, eos_tokens(model, processor), 3)


def test_greedy_is_its_own_generate(family, examples):
    model, processor = load(family)
    inputs = inputs_of(processor, examples[4:6])
    ids, mask = sample(model, inputs, eos_tokens(model, processor), 8)
    theirs = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    for b, real in enumerate(mask[:, 0]):
        assert torch.equal(ids[b, 0, real], theirs[b, : real.sum()])


def test_it_hears(family, examples):
    model, processor = load(family)
    inputs, other = inputs_of(processor, examples[:1]), inputs_of(processor, examples[1:2])
    ids, mask = random_completions([[4]])
    logps = shared_prompt_logps(model, inputs, ids, mask, 1.0)
    features = other["input_features"] * (inputs["input_features"] != 0) if family.name == "glmasr" else None
    other = inputs | {"input_features": other["input_features"] if features is None else features}
    assert (logps - shared_prompt_logps(model, other, ids, mask, 1.0)).abs().max() > 1e-4


@pytest.mark.parametrize("flags", [{}, {"train": ["projector", "language"]}, {"lora_rank": 2}], ids=str)
def test_trained_weights_get_a_gradient_and_a_frozen_encoder_can_be_cached(family, examples, flags):
    settings = config("train_grpo", family.folder, "unused", **flags)
    model, processor, _, _ = load_policy(settings, Accelerator())
    inputs = inputs_of(processor, examples[4:6])
    ids, mask = random_completions(LENGTHS)
    logps = shared_prompt_logps(model, inputs, ids, mask, 1.0)
    found = gradients(model, logps)
    # DDP hangs if one is left out
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    reached = {part for part in ("audio_tower", "projector", "language_model") for n in found if part in n}
    if flags == {"lora_rank": 2}:
        assert reached == {"language_model"}
    else:
        projector = {"projector"} - ({"projector"} if "omni" in family.name else set())
        assert reached == {"language_model"} | projector | ({"audio_tower"} if not flags else set())
    assert encoder_is_frozen(model) == (bool(flags) and "projector" not in reached)
    with torch.no_grad():
        inputs["encoded_audio"] = encode_audio(model, inputs)
    again = shared_prompt_logps(model, inputs, ids, mask, 1.0)
    assert torch.equal(again, logps)
    second = select_rows(inputs, slice(1, 2))
    torch.testing.assert_close(
        shared_prompt_logps(model, second, ids[1:], mask[1:], 1.0), logps[1:], atol=1e-5, rtol=0
    )
    layers = Policy(model)._no_split_modules
    assert any("Encoder" in name for name in layers) and any("Decoder" in name for name in layers)


def test_the_reference_is_the_policy_before_training(family, examples):
    """In bf16, too: frozen weights are stored in bf16 if autocast would compute in it."""
    if family.name == "qwen3_omni_moe":
        pytest.skip("autocast leaves its experts in fp32; at its size only FSDP2 trains all weights")
    accelerator = SimpleNamespace(mixed_precision="bf16")
    settings = config("train_grpo", family.folder, "")
    policy, processor, _, _ = load_policy(settings, accelerator)
    reference = load_reference(settings, accelerator)
    inputs = inputs_of(processor, examples[4:6])
    ids, mask = random_completions(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = (shared_prompt_logps(model, inputs, ids, mask, 1.0) for model in (policy, reference))
    assert torch.equal(one, two)


def test_the_policy_that_is_scored_is_the_one_that_samples(family, examples, tmp_path):
    """Whatever dropout the model's config asks for."""

    def drop(settings):
        for name, value in settings.items():
            if isinstance(value, dict):
                drop(value)
            elif str(name).endswith(("dropout", "layerdrop")):
                settings[name] = 0.5
                changed.append(name)

    changed, (model, processor) = [], load(family)
    settings = model.config.to_dict()
    drop(settings)
    shutil.copytree(family.folder / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    inputs = inputs_of(processor, examples[4:6])
    ids, mask = random_completions(LENGTHS)
    with torch.no_grad():
        expected = shared_prompt_logps(model, inputs, ids, mask, 1.0)
        dropping, _ = load_model(str(tmp_path / "model"))
        assert not torch.equal(shared_prompt_logps(dropping.train(), inputs, ids, mask, 1.0), expected)
        flags = config("train_grpo", tmp_path, "")
        policy, _, _, _ = load_policy(flags, SimpleNamespace(mixed_precision="no"))
        assert torch.equal(shared_prompt_logps(policy.train(), inputs, ids, mask, 1.0), expected)
    assert changed


def test_a_question_with_the_placeholder_in_it_is_refused(family, examples):
    processor = load_processor(str(family.folder / "model"))
    example = replace(examples[0], question=f"What is {processor.audio_token}?")
    with pytest.raises(BadInput, match="jsonl:1: the text contains the special token "):
        read_clip(processor, example, "answer")


@pytest.mark.parametrize(
    "flags", [{}, {"lora_rank": 2, "train": ["encoder", "language"]}], ids=["full", "lora"]
)
def test_its_own_class_loads_the_saved_model(
    family, examples, tmp_path, monkeypatch, reward_odd_lengths, flags
):
    runs, save_final = [], train_grpo.save_final
    monkeypatch.setattr(train_grpo, "save_final", lambda run: (runs.append(run), save_final(run)))
    run_script("train_grpo", family.folder, tmp_path / "run", **flags)
    trained = runs[0].model.eval()
    if flags:
        from peft import PeftModel

        base = family.kind.from_pretrained(family.folder / "model", dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, tmp_path / "run").get_base_model()
    else:
        loaded = family.kind.from_pretrained(tmp_path / "run")
        assert loaded.dtype == torch.float32
    base, _ = load(family)
    processor = load_processor(str(tmp_path / "run"))
    if "omni" in family.name:  # saved as its users need it, not as it is used here
        assert processor.feature_extractor.chunk_length == 300
    inputs = inputs_of(processor, examples[4:6])
    ids, mask = random_completions(LENGTHS)
    expected, found, untrained = (
        shared_prompt_logps(m.eval(), inputs, ids, mask, 1.0) for m in (trained, loaded, base)
    )
    assert torch.equal(found, expected) and not torch.allclose(found, untrained, atol=1e-4)


def test_supervised_training_evaluation_and_merging(family, tmp_path, monkeypatch, capsys):
    """Targets end like the model's own turn; adapters and the merged model give the same answers."""
    run_script("train_sft", family.folder, tmp_path / "run", lora_rank=2, merge=True)
    processor = load_processor(str(family.folder / "model"))
    ids, mask = train_sft.make_targets(processor, [SimpleNamespace(answer="a dog", thought="")], "answer")
    end = "</s>" if family.name == "voxtral" else "<|im_end|>"
    assert ids[0, 0, -1] == processor.tokenizer.convert_tokens_to_ids(end) and mask.all()
    assert processor.tokenizer.decode(ids[0, 0, :-1].tolist()) == "<answer>a dog</answer>"
    data, ask = str(family.folder / "test.jsonl"), str(next((family.folder / "test").glob("*.wav")))
    results = []
    for model in ("run", "run/merged"):
        flags = f"--model {tmp_path / model} --max_new_tokens 4 --limit 4"
        monkeypatch.setattr(
            "sys.argv",
            ["evaluate.py", *flags.split(), "--data", data, "--output", str(tmp_path / "eval" / model)],
        )
        evaluate.main()
        results.append(json.loads((tmp_path / "eval" / model / "predictions.json").read_text()))
    assert [row["model_output"] for row in results[0]] == [row["model_output"] for row in results[1]]
    question = f"--model {tmp_path}/run/merged --ask {ask} --question What? --choices a b --max_new_tokens 3"
    monkeypatch.setattr("sys.argv", ["evaluate.py", *question.split()])
    evaluate.main()
    assert "error" not in capsys.readouterr().err


def test_clips_are_cut_at_30_s(family, examples):
    """The toy's window is 2 s, and Omni's 300 s in its own settings."""
    _, processor = load(family)
    seconds = 30 if family.name in ("qwen2_5_omni", "qwen3_omni_moe", "voxtral") else toy.SECONDS
    assert window_size(processor) == seconds * SAMPLE_RATE
    wave = np.random.default_rng(0).normal(0, 0.1, (seconds + 3) * SAMPLE_RATE).astype(np.float32)
    long, cut = (
        make_inputs(processor, examples[:1], [w], "answer") for w in (wave, wave[: window_size(processor)])
    )
    assert is_cut(processor, wave) and not is_cut(processor, wave[: window_size(processor)])
    assert len(long["input_features"]) == 1 and all(torch.equal(long[name], cut[name]) for name in cut)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"lora_rank": 2}], ids=["full", "LoRA"])
def test_the_same_run_in_two_processes_under_fsdp2(family, tmp_path, reward_odd_lengths, plain_sgd, flags):
    flags = flags | dict(lr=0.1, max_steps=3)
    run_script("train_grpo", family.folder, tmp_path / "one", **flags)
    two = config("train_grpo", family.folder, tmp_path / "two", **flags)
    without = "import families, pytest\nfamilies.without_torchvision(pytest.MonkeyPatch())\n"
    launch(training_code("train_grpo", SGD + without), *as_flags(two), fsdp=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_grpo_teaches_a_tiny_omni(tmp_path, monkeypatch):
    """A Qwen2.5-Omni of the toy's size, warmed up like the toy: GRPO must gain 15 points."""
    without_torchvision(monkeypatch)
    toy.make_data(tmp_path, "train", 1600, seed=1)
    toy.make_data(tmp_path, "test", 300, seed=2)
    make_omni("qwen2_5_omni", tmp_path / "model", size=128, seconds=toy.SECONDS, window=100)
    files = dict(data=str(tmp_path / "train.jsonl"), eval_data=str(tmp_path / "test.jsonl"))
    for script, flags, model in (
        ("train_sft", toy.WARMUP, "model"),
        ("train_grpo", toy.TRAINING + " --micro_batch 16", "train_sft"),
    ):
        flags = {
            name: float(value) if "." in value or "e" in value else int(value) for name, value in pairs(flags)
        }
        settings = dict(model=str(tmp_path / model), output=str(tmp_path / script)) | files
        settings = importlib.import_module(script).Config(**settings | flags)
        importlib.import_module(script).train(settings)
    before, *_, after = [
        line["eval_accuracy"] for line in metrics(tmp_path / "train_grpo") if "eval_accuracy" in line
    ]
    print(before, after)
    assert after > before + 0.15


# ---------------------------------------------------------------- loading


def full_omni(thinker, path, gigabytes=0):
    """Save a thinker in the hub's layout of the full model: in shards, with a talker and a vocoder."""
    thinker.save_pretrained(path)  # with the hub's names
    saved = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weights = {f"thinker.{name}": weight for name, weight in saved.items()}
    shards = {"thinker": weights, "rest": {"talker.model.norm.weight": torch.ones(8)}}
    vocoder = "token2wav" if thinker.config.model_type.startswith("qwen2_5") else "code2wav"
    shards["rest"][f"{vocoder}.proj_out.weight"] = torch.ones(8, 8)
    index = {}
    for n, tensors in enumerate(shards.values(), 1):
        shard = f"model-0000{n}-of-00003.safetensors"
        save_file(tensors, path / shard, {"format": "pt"})
        index |= dict.fromkeys(tensors, shard)
    # a large tensor that takes no disk space: a header and a hole
    shape = [gigabytes << 28]
    header = {"talker.codec_head.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0]]}}
    header = json.dumps(header).encode()
    with open(path / "model-00003-of-00003.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * shape[0])
    index["talker.codec_head.weight"] = "model-00003-of-00003.safetensors"
    total = {"metadata": {"total_size": 0}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(total))
    config = json.loads((path / "config.json").read_text())
    kind = config["model_type"].removesuffix("_thinker")
    (path / "config.json").write_text(json.dumps({"model_type": kind, "thinker_config": config}))


def memory(name):
    """An entry of /proc/self/status, in GB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_only_the_thinker_of_a_full_omni_checkpoint_is_read(name, tmp_path, monkeypatch, examples):
    without_torchvision(monkeypatch)
    make(name, tmp_path / "thinker")
    thinker, processor = load_model(str(tmp_path / "thinker"), torch.float32)
    full_omni(thinker, tmp_path / "full", gigabytes=4)
    processor.save_pretrained(tmp_path / "full")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = memory("VmRSS")
    loaded, processor = load_model(str(tmp_path / "full"), torch.float32)
    assert memory("VmHWM") - before < 0.5
    inputs = inputs_of(processor, examples[:2])
    ids, mask = random_completions(LENGTHS)
    one, two = (shared_prompt_logps(m.eval(), inputs, ids, mask, 1.0) for m in (thinker, loaded))
    assert torch.equal(one, two)


def test_an_unknown_kind_is_told_what_is_supported(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BadInput, match="is a llama model; supported: qwen2_audio, qwen2_5_omni, .*voxtral"):
        load_model(str(tmp_path))


def test_a_kind_that_this_transformers_does_not_have_is_refused(folder, monkeypatch):
    monkeypatch.setitem(FAMILIES, "qwen2_audio", "NotYetThere")
    with pytest.raises(BadInput, match="transformers has no attribute NotYetThere"):
        load_model(str(folder / "model"))


@pytest.mark.skipif(importlib.util.find_spec("torchvision"), reason="torchvision is installed")
def test_a_missing_package_is_named(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        without_torchvision(patch)
        make("qwen2_5_omni", tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["video_processor"] = {"video_processor_type": "Qwen2VLVideoProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match="ImportError: .*Video"):
        load_processor(str(tmp_path))


def test_no_other_script_asks_which_model_it_is():
    for path in ROOT.glob("*.py"):
        if path.name not in ("model.py", "toy.py"):  # the toy makes a Qwen2-Audio
            assert not re.search("model_type|ForConditionalGeneration", path.read_text()), path.name
