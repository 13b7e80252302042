import json
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from oracle import inputs_of
from test_train_grpo import config, metrics

import train_grpo
import training
from data import BadInput, load_examples
from training import batches, read_batch

ONE = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))


def test_a_batch_is_prepared_while_the_one_before_is_used(folder, tmp_path, toy_model, examples, monkeypatch):
    began = [threading.Event() for _ in range(3)]

    def read(*args):
        began[args[3] // 4].set()
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


def test_a_stand_in_is_looked_for_anew_for_each_question(folder, tmp_path, toy_model, capsys):
    """More bad clips are met in a batch than there are rows, and yet half of the rows can be read."""
    rows = load_examples(str(folder / "train.jsonl"))[:4]
    examples = [replace(row, audio=str(tmp_path / "no.wav")) for row in rows[:2]] + rows[2:]
    settings = config(folder, tmp_path, prompts_per_step=32, skip_bad_audio=True)
    batch, _, clips = read_batch(toy_model[1], examples, settings, 0, 32)
    assert {example.place for example in batch} == {example.place for example in examples[2:]}
    assert clips["clips_skipped"] == (8 * 2 + 8 * 1) / 32  # of the first bad row the second is met, too
    with pytest.raises(BadInput, match="no such audio file"):
        read_batch(toy_model[1], examples[:2], settings, 0, 32)


def test_a_full_gpu_is_said_in_one_line(monkeypatch):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")

    with pytest.raises(SystemExit) as stop:
        training.run(full)
    assert str(stop.value).startswith("error: the GPU's memory is full") and "--micro_batch" in str(stop.value)
    assert "\n" not in str(stop.value)
