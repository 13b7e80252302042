import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, inputs_of, metrics, run_script, write
from peft import PeftModel
from safetensors.torch import load_file

from checkpoints import merge
from cli import BadInput
from model import load_model
from train_sft import make_targets


def train(folder, output, **flags):
    run_script("train_sft", folder, output, **flags)


@pytest.mark.parametrize("prompt", ["plain", "answer", "think"])
def test_loss_is_the_models_own_on_the_answer_tokens(
    folder, tmp_path, toy_model, examples, monkeypatch, prompt
):
    model, processor = toy_model
    monkeypatch.setattr("data.stream_indices", lambda *_: [3])
    train(folder, tmp_path / "run", prompts_per_step=1, max_steps=1, prompt=prompt)
    inputs = inputs_of(processor, examples[3:4], prompt)
    targets = {"plain": "{answer}", "answer": "<answer>{answer}</answer>"}
    targets["think"] = "<think>{thought}</think><answer>{answer}</answer>"
    target = targets[prompt].format(**examples[3].row) + "<|im_end|>"
    answer = processor.tokenizer(target, return_tensors="pt")["input_ids"]
    ids = torch.cat([inputs["input_ids"], answer], 1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    own = model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=labels).loss
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(own.item(), abs=1e-5)


def test_a_steps_loss_is_the_mean_over_all_its_answer_tokens(
    folder, tmp_path, toy_model, examples, monkeypatch
):
    """With answers of unequal length, in micro-batches: each token counts once, as in a plain loop."""
    model, processor = toy_model
    monkeypatch.setattr("data.stream_indices", lambda *_: [0, 1, 2, 3, 4, 5])
    train(folder, tmp_path / "run", prompts_per_step=6, micro_batch=2, max_steps=1)
    losses = []
    for example in examples[:6]:
        inputs = inputs_of(processor, [example])
        target = f"<answer>{example.answer}</answer><|im_end|>"
        answer = processor.tokenizer(target, return_tensors="pt")["input_ids"]
        ids = torch.cat([inputs["input_ids"], answer], 1)
        logits = model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        logits = logits[0, -answer.shape[1] - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, answer[0], reduction="none").tolist()
    assert len({len(example.answer) for example in examples[:6]}) > 1
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_targets_end_as_a_turn_ends(toy_model, examples):
    _, processor = toy_model
    ids, mask = make_targets(processor, examples[:24], "answer")
    assert ids.shape == mask.shape and ids.shape[1] == 1 and not mask.all()
    for example, o, m in zip(examples, ids[:, 0], mask[:, 0]):
        assert processor.tokenizer.decode(o[m]) == f"<answer>{example.answer}</answer><|im_end|>"
        assert m[0] and (m[:-1] >= m[1:]).all()  # padded on the right


def test_it_overfits_a_few_rows(folder, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(open(folder / "train.jsonl").readlines()[:4]))
    train(
        folder, tmp_path / "run", data=str(few), audio_dir=str(folder), lr=2e-3, max_steps=40, micro_batch=4
    )
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] > 3 and lines[-1]["loss"] < 0.3


@pytest.mark.parametrize("epochs, steps", [(1.0, 6), (0.5, 3), (1.1, 7)])
def test_epochs_say_how_many_steps(folder, tmp_path, epochs, steps):
    train(folder, tmp_path / "run", max_steps=0, epochs=epochs, micro_batch=4)
    assert len(metrics(tmp_path / "run")) == steps


def test_nothing_to_do_is_refused(folder, tmp_path):
    with pytest.raises(BadInput, match="nothing to do: --max_steps or --epochs"):
        train(folder, tmp_path / "run", max_steps=0, epochs=0.0)
    with pytest.raises(BadInput, match="--max_steps must be at least 0"):
        train(folder, tmp_path / "run", max_steps=-1)


@pytest.mark.parametrize(
    "thought", [None, "", " \n", 3, ["it barks"], "it <answer>barks", "it</think> barks"]
)
def test_rows_without_a_thought_cannot_be_imitated(folder, tmp_path, thought):
    rows = [json.loads(line) for line in open(folder / "train.jsonl")]
    rows[20]["thought"] = thought
    if thought is None:
        del rows[20]["thought"]
    path = write(tmp_path / "rows", rows)
    flags = dict(data=path, audio_dir=str(folder), max_steps=1)
    with pytest.raises(
        BadInput, match="rows:21: no thought to imitate [(]key 'thought', text without tags[)]"
    ):
        train(folder, tmp_path / "run", prompt="think", **flags)
    train(folder, tmp_path / "answers", **flags)  # answers need no thoughts


# ---------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory):
    """Adapters that have learned something, and the merged model beside them."""
    output = tmp_path_factory.mktemp("lora") / "run"
    train(folder, output, lora_rank=4, lr=1e-2, max_steps=4, merge=True)
    return output


def logits(model, inputs):
    return model(**inputs).logits.detach()


def test_adapters_off_is_the_base_to_the_bit(folder, lora, toy_model, examples):
    base, processor = toy_model
    inputs = inputs_of(processor, examples[:3])
    model = PeftModel.from_pretrained(load_model(str(folder / "model"), torch.float32)[0], lora).eval()
    assert (logits(model, inputs) - logits(base, inputs)).abs().max() > 0.1  # it has learned
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(base, inputs))


def test_merged_equals_unmerged_and_peft_loads_what_we_do(folder, lora, examples):
    adapted, processor = load_model(str(lora))
    merged, _ = load_model(str(lora / "merged"))
    by_peft = PeftModel.from_pretrained(load_model(str(folder / "model"), torch.float32)[0], lora)
    inputs = inputs_of(processor, examples[:3])
    assert not any("lora" in name for name in merged.state_dict())
    assert torch.allclose(logits(merged.eval(), inputs), logits(adapted.eval(), inputs), atol=1e-4)
    assert torch.equal(logits(by_peft.eval(), inputs), logits(adapted, inputs))


def test_only_adapters_of_the_language_model_are_kept(lora):
    names = load_file(lora / "adapter_model.safetensors").keys()
    layers = {
        re.search(r"language_model\.layers\.\d+\.\w+\.(\w+)\.lora_[AB]\.weight", name)[1] for name in names
    }
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not (lora / "model.safetensors").exists()


@pytest.mark.parametrize(
    "parts, found",
    [(["encoder", "language"], "q_proj k_proj v_proj out_proj fc1 fc2"), (["projector"], "linear")],
    ids=str,
)
def test_adapters_go_where_they_are_told(folder, tmp_path, parts, found):
    train(folder, tmp_path / "run", lora_rank=2, train=parts, max_steps=1)
    names = load_file(tmp_path / "run" / "adapter_model.safetensors").keys()
    assert any("language_model" in name for name in names) == ("language" in parts)
    assert {name.split(".")[-3] for name in names if "language_model" not in name} == set(found.split())


@pytest.mark.parametrize("parts", [["encoder"], ["projector"], ["projector", "language"]], ids=str)
def test_only_these_parts_are_trained(folder, tmp_path, parts):
    train(folder, tmp_path / "run", train=parts, max_steps=2)
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    prefixes = {"encoder": "audio_tower", "projector": "multi_modal_projector", "language": "language_model"}
    expected = tuple(prefixes[part] for part in parts)
    assert moved == {name for name in before if name.startswith(expected) and "embed_positions" not in name}


def test_the_learning_rate_warms_up_and_decays(folder, tmp_path):
    train(folder, tmp_path / "run", max_steps=8, warmup_steps=4, lr=0.8)
    rates = [line["lr"] for line in metrics(tmp_path / "run")]
    assert rates == pytest.approx([0.2, 0.4 * 7 / 8, 0.6 * 6 / 8, 0.8 * 5 / 8, 0.4, 0.3, 0.2, 0.1])


def test_lora_overfits_a_few_rows(folder, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(open(folder / "train.jsonl").readlines()[:2]))
    flags = dict(
        data=str(few),
        audio_dir=str(folder),
        lr=2e-2,
        max_steps=60,
        micro_batch=4,
        lora_rank=8,
        lora_dropout=0.05,
    )
    train(folder, tmp_path / "run", **flags)
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] > 3 and lines[-1]["loss"] < 1


def test_the_same_seed_makes_the_same_adapters(folder, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(folder, tmp_path / name, lora_rank=2, max_steps=1, lr=0.0, seed=seed)
    a, b, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a) and not all(
        torch.equal(a[name], c[name]) for name in a
    )


BAD = {
    "merge without LoRA": (dict(merge=True), "--merge needs LoRA adapters"),
    "negative rank": (dict(lora_rank=-1), "--lora_rank must be at least 0"),
    "dropout": (
        dict(lora_rank=2, lora_dropout=1.5),
        "--lora_dropout must be at least 0 and below 1, not 1.5",
    ),
    "unknown part": (dict(train=["vision"]), "--train vision: unknown, choose from encoder, projector"),
}


@pytest.mark.parametrize("flags, says", BAD.values(), ids=BAD)
def test_bad_lora_flags_are_refused(folder, tmp_path, flags, says):
    with pytest.raises(BadInput, match=says):
        train(folder, tmp_path / "run", **flags)


def test_merging_is_a_command(lora, tmp_path):
    command = [sys.executable, ROOT / "checkpoints.py", lora, "--output", f"{tmp_path}/merged/"]
    subprocess.run(command, check=True)
    one, two = (
        load_file(lora / "merged" / "model.safetensors"),
        load_file(tmp_path / "merged" / "model.safetensors"),
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.startswith(f"error: {tmp_path}/merged: already exists")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_know_the_weights_of_their_base(folder, tmp_path, dtype):
    """Trained, evaluated and merged in the dtype that the base was saved in."""
    base, processor = load_model(str(folder / "model"), dtype)
    for path in (base_path := tmp_path / "base", tmp_path / "other"):
        base.save_pretrained(path)
        processor.save_pretrained(path)
    train(folder, tmp_path / "run", model=str(base_path), lora_rank=2, max_steps=1, merge=True)
    load_model(str(tmp_path / "run"))
    merged = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {dtype}
    assert json.loads((tmp_path / "run" / "merged" / "run.json").read_text())["prompt"] == "answer"
    shutil.rmtree(base_path)
    train(folder, tmp_path / "more", model=str(tmp_path / "other"), max_steps=1)
    (tmp_path / "more").rename(base_path)  # retrained under the same path
    with pytest.raises(BadInput, match="run: the base model does not have the weights that these adapters"):
        load_model(str(tmp_path / "run"))
    with pytest.raises(BadInput, match="run: the base model does not have the weights that these adapters"):
        merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    shutil.rmtree(base_path)
    with pytest.raises(BadInput, match="run: the base of these adapters: .*base: "):
        load_model(str(tmp_path / "run"))


def test_adapters_that_cannot_be_loaded_are_refused(folder, lora, tmp_path):
    with pytest.raises(BadInput, match="contains LoRA adapters; merge them first"):
        train(folder, tmp_path / "run", model=str(lora))
    (tmp_path / "no base").mkdir()
    (tmp_path / "no base" / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match="adapter_config.json: KeyError: 'base_model_name_or_path'"):
        load_model(str(tmp_path / "no base"))
    shutil.copytree(lora, tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(BadInput, match="damaged: SafetensorError"):
        load_model(str(tmp_path / "damaged"))
    with pytest.raises(BadInput, match="merged: already exists"):
        merge(str(lora), str(lora / "merged"))
    with pytest.raises(BadInput, match="contains no LoRA adapters"):
        merge(str(lora / "merged"), str(tmp_path / "merged"))
