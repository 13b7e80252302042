import json

import pytest
import torch
from launch import as_flags, launch
from oracle import prompt_alone
from safetensors.torch import load_file

from data import BadInput
from train_sft import Config, answer_batch, train


def config(folder, output, **flags):
    settings = dict(model=str(folder / "model"), data=str(folder / "train.jsonl"), output=str(output))
    return Config(**settings | dict(prompts_per_step=4, max_steps=2, lr=1e-2) | flags)


def metrics(output):
    return [json.loads(line) for line in open(output / "metrics.jsonl")]


@pytest.mark.parametrize("prompt", ["plain", "answer"])
def test_loss_is_the_models_own_on_the_answer_tokens(folder, tmp_path, toy_model, examples, monkeypatch, prompt):
    model, processor = toy_model
    monkeypatch.setattr("train_sft.stream_indices", lambda *_: [3])
    train(config(folder, tmp_path / "run", prompts_per_step=1, max_steps=1, prompt=prompt))
    inputs = prompt_alone(processor, examples[3], prompt)
    target = {"plain": "{}<|im_end|>", "answer": "<answer>{}</answer><|im_end|>"}[prompt].format(examples[3].answer)
    answer = processor.tokenizer(target, return_tensors="pt")["input_ids"]
    ids = torch.cat([inputs["input_ids"], answer], 1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    own = model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=labels).loss
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(own.item(), abs=1e-5)


def test_targets_end_as_a_turn_ends(toy_model, examples):
    _, processor = toy_model
    ids, mask = answer_batch(processor, examples[:24], "answer")
    assert ids.shape == mask.shape and ids.shape[1] == 1 and not mask.all()
    for example, o, m in zip(examples, ids[:, 0], mask[:, 0]):
        assert processor.tokenizer.decode(o[m]) == f"<answer>{example.answer}</answer><|im_end|>"
        assert m[0] and (m[:-1] >= m[1:]).all()  # padded on the right


def test_micro_batch_changes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, weight_decay: torch.optim.SGD(p, lr))
    for micro_batch in (1, 2, 4):
        train(config(folder, tmp_path / str(micro_batch), micro_batch=micro_batch, lr=0.1))
    one, two, four = (load_file(tmp_path / str(n) / "model.safetensors") for n in (1, 2, 4))
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], atol=1e-6) and torch.allclose(weight, four[name], atol=1e-6), name
    assert metrics(tmp_path / "1")[0]["loss"] == pytest.approx(metrics(tmp_path / "4")[0]["loss"], rel=1e-5)


def test_two_processes_make_the_same_update(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, weight_decay: torch.optim.SGD(p, lr))
    train(config(folder, tmp_path / "one", lr=0.1))
    launch(
        "import torch, train_sft\n"
        "torch.optim.AdamW = lambda p, lr, weight_decay: torch.optim.SGD(p, lr)\n"
        "train_sft.train(train_sft.parse(train_sft.Config, ''))\n",
        *as_flags(config(folder, tmp_path / "two", lr=0.1)),
    )
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "answer_tokens"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_it_learns_by_heart(folder, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(open(folder / "train.jsonl").readlines()[:4]))
    train(config(folder, tmp_path / "run", data=str(few), audio_dir=str(folder), lr=2e-3, max_steps=40, micro_batch=4))
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] > 3 and lines[-1]["loss"] < 0.3


@pytest.mark.parametrize("epochs, steps", [(1.0, 6), (0.5, 3), (1.1, 7)])
def test_epochs_say_how_many_steps(folder, tmp_path, epochs, steps):
    train(config(folder, tmp_path / "run", max_steps=0, epochs=epochs, micro_batch=4))
    assert len(metrics(tmp_path / "run")) == steps


def test_thoughts_cannot_be_imitated(folder, tmp_path):
    with pytest.raises(BadInput, match="no thoughts to imitate"):
        train(config(folder, tmp_path / "run", prompt="think"))
