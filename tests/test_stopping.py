"""Runs that hit a problem or get a signal: all processes save and stop, and resuming gives the same run."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, as_flags, assert_same_run, config, launch, load_examples, metrics, run_script
from conftest import training_code

import evaluate
import train_grpo
import training
from checkpoints import list_states
from cli import BadInput
from data import stream_indices


@pytest.fixture
def own_data(folder, tmp_path):
    """Settings for a five-step run on a copy of the small toy's questions, which a test may change."""
    shutil.copytree(folder / "train", tmp_path / "train")
    shutil.copy(folder / "train.jsonl", tmp_path)
    return dict(data=str(tmp_path / "train.jsonl"), max_steps=5, save_every=3)


def at_step(monkeypatch, script, step, action):
    """Do something in the middle of a step, before its update."""
    check_update = training.check_update

    def check_and_act(run, now, *args):
        if now == step:
            action()
        check_update(run, now, *args)

    monkeypatch.setattr(f"{script}.check_update", check_and_act)


def saved_steps(output):
    return [int(path.rsplit("-", 1)[1]) for path in list_states(str(output))]


# ---------------------------------------------------------------- one process


def test_a_folder_belongs_to_one_run(folder, tmp_path, monkeypatch):
    code = f"import data; lock = data.lock_folder({str(tmp_path / 'run')!r})\n"
    code += "print('locked', flush=True); input()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert other.stdout.readline() == "locked\n"
    for resume in (False, True):
        with pytest.raises(BadInput, match="run: another run is using this folder"):
            run_script("train_sft", folder, tmp_path / "run", resume=resume)
    flags = ["--model", folder / "model", "--data", folder / "test.jsonl", "--output", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    with pytest.raises(BadInput, match="run: another run is using this folder"):
        evaluate.main()
    assert os.listdir(tmp_path / "run") == [".lock"]
    other.kill()
    other.wait()
    run_script("train_sft", folder, tmp_path / "run", max_steps=1)  # a killed run does not keep the lock


def test_a_run_saves_and_stops_when_a_clip_disappears(
    folder, tmp_path, monkeypatch, own_data, reward_odd_lengths
):
    run_script("train_grpo", folder, tmp_path / "whole", **own_data)
    gone = load_examples(own_data["data"])[stream_indices(24, 42, 16, 1)[0]].audio  # of step 4
    at_step(monkeypatch, "train_grpo", 1, lambda: os.rename(gone, gone + ".moved"))
    with pytest.raises(BadInput, match="no such audio file"):
        run_script("train_grpo", folder, tmp_path / "run", **own_data)
    assert saved_steps(tmp_path / "run") == [4]
    os.rename(gone + ".moved", gone)
    run_script("train_grpo", folder, tmp_path / "run", resume=True, **own_data)
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)


@pytest.mark.parametrize("error", [KeyError("answer"), BadInput("the judge does not answer")], ids=repr)
def test_a_run_saves_and_stops_when_a_reward_fails(folder, tmp_path, monkeypatch, own_data, error):
    """Whatever the error is: a bug in a fork's reward must not cost the steps before it."""
    calls = []

    def rewards(*args):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return plain(*args)

    plain = train_grpo.compute_rewards
    monkeypatch.setattr(train_grpo, "compute_rewards", rewards)
    with pytest.raises(type(error)):
        run_script("train_grpo", folder, tmp_path / "run", samples_every=0, **own_data)
    assert saved_steps(tmp_path / "run") == [2]


def test_a_run_saves_and_stops_when_metrics_cannot_be_written(folder, tmp_path, monkeypatch, own_data):
    def harm():
        (tmp_path / "run" / "metrics.jsonl").unlink()
        (tmp_path / "run" / "metrics.jsonl").mkdir()

    at_step(monkeypatch, "train_sft", 1, harm)
    with pytest.raises(OSError, match="metrics.jsonl"):
        run_script("train_sft", folder, tmp_path / "run", **own_data)
    assert saved_steps(tmp_path / "run") == [2]


@pytest.mark.parametrize("iterations, saved", [(1, [2]), (2, [])])
def test_a_loss_that_is_nan_stops_the_run_before_the_weights_change(
    folder, tmp_path, monkeypatch, own_data, iterations, saved
):
    """After the first of two updates there is no clean state to save."""
    calls, plain = [], train_grpo.grpo_loss
    first_bad = 4 * 2 * iterations + 4 * (iterations - 1) + 3  # third micro-batch of step 2's last update

    def grpo_loss(*args):
        calls.append(1)
        loss, *more = plain(*args)
        return (loss * torch.nan if len(calls) == first_bad else loss), *more

    monkeypatch.setattr(train_grpo, "grpo_loss", grpo_loss)
    third = load_examples(own_data["data"])[stream_indices(24, 42, 4 * 2 + 2, 1)[0]].location
    with pytest.raises(BadInput, match=f"step 2: the loss is nan or inf for {third}; no update was made"):
        run_script("train_grpo", folder, tmp_path / "run", num_iterations=iterations, **own_data)
    assert saved_steps(tmp_path / "run") == saved


def test_a_step_that_stops_a_run_again_and_again_can_be_skipped(folder, tmp_path, monkeypatch, own_data):
    """A resumed run gets the same prompts again; the message says how to get past them."""
    broken = load_examples(own_data["data"])[stream_indices(24, 42, 4 * 2, 1)[0]].location  # of step 2
    plain = training.check_update

    def check_update(run, step, batch, losses, grad_norm):
        if any(example.location == broken for example in batch.examples):
            losses = [loss * torch.nan for loss in losses]
        plain(run, step, batch, losses, grad_norm)

    monkeypatch.setattr(train_grpo, "check_update", check_update)
    flags = dict(eval_data=str(folder / "test.jsonl"), eval_every=2, **own_data)
    for resume in (False, True):
        with pytest.raises(BadInput, match="step 2: .*; --resume --skip_steps 2 skips it"):
            run_script("train_grpo", folder, tmp_path / "run", resume=resume, **flags)
    run_script("train_grpo", folder, tmp_path / "run", resume=True, skip_steps=[2], **flags)
    assert (tmp_path / "run" / "checkpoint-3").exists()  # due after the skipped step
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [0, 1, 3, 4]
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [0, 2, 4, 5]


SIGNALS = {"with clips": (6, 2), "with silence": (9, 2), "at the end": (12, 4)}


@pytest.mark.parametrize("batches_before, saved", SIGNALS.values(), ids=SIGNALS)
def test_a_signal_during_an_evaluation_is_obeyed(
    folder, tmp_path, monkeypatch, own_data, reward_odd_lengths, batches_before, saved
):
    """Between two of its batches; resuming gives the same run.

    An evaluation, at steps 0, 2 and 4, has 3 batches with clips and 3 with silence.
    """
    flags = own_data | dict(max_steps=4, save_every=9, eval_data=str(folder / "test.jsonl"), eval_every=2)
    flags |= dict(eval_batch_size=4)
    run_script("train_grpo", folder, tmp_path / "whole", **flags)
    batches, plain = [], evaluate.answer

    def answer(*args):
        batches.append(1)
        if len(batches) == batches_before + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(evaluate, "answer", answer)
    with pytest.raises(SystemExit) as status:
        run_script("train_grpo", folder, tmp_path / "run", **flags)
    assert status.value.code == 128 + signal.SIGTERM and len(batches) == batches_before + 1
    assert saved_steps(tmp_path / "run") == [saved]
    run_script("train_grpo", folder, tmp_path / "run", resume=True, **flags)
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)


def test_a_signal_between_two_updates_waits_for_the_end_of_the_step(
    folder, tmp_path, monkeypatch, own_data, reward_odd_lengths
):
    flags = dict(num_iterations=2, samples_every=0, **own_data)
    run_script("train_grpo", folder, tmp_path / "whole", **flags)
    calls, plain = [], training.check_update

    def check_update(*args):
        calls.append(1)
        if len(calls) == 4:  # the second update of step 1
            os.kill(os.getpid(), signal.SIGUSR1)
        plain(*args)

    monkeypatch.setattr(train_grpo, "check_update", check_update)
    with pytest.raises(SystemExit) as status:
        run_script("train_grpo", folder, tmp_path / "run", **flags)
    assert status.value.code == 128 + signal.SIGUSR1 and saved_steps(tmp_path / "run") == [2]
    run_script("train_grpo", folder, tmp_path / "run", resume=True, **flags)
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)


def test_an_ignored_signal_stays_ignored(folder, tmp_path, monkeypatch, own_data):
    """Like SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, "train_sft", 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
    run_script("train_sft", folder, tmp_path / "run", **own_data)
    assert len(metrics(tmp_path / "run")) == 5
    signal.signal(signal.SIGHUP, before)


# ---------------------------------------------------------------- two processes

# something that the main process does in the middle of a step
AT_STEP = """
import os, training
plain = training.check_update
def check_update(run, step, *args):
    if step == {step} and Accelerator().is_main_process:
        {action}
    plain(run, step, *args)
train_grpo.check_update = check_update
"""


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_a_problem_of_one_process_stops_and_saves_both(folder, tmp_path, own_data, fsdp):
    """One of the second process's clips disappears; the resumed run equals one that never stopped."""
    settings = {name: config("train_grpo", folder, tmp_path / name, **own_data) for name in ("whole", "run")}
    launch(training_code("train_grpo"), *as_flags(settings["whole"]), fsdp=fsdp)
    gone = load_examples(own_data["data"])[stream_indices(24, 42, 4 * 3 + 2, 1)[0]].audio  # of step 3
    code = AT_STEP.format(step=0, action=f"os.rename({gone!r}, {gone + '.moved'!r})")
    with pytest.raises(AssertionError, match="no such audio file"):
        launch(training_code("train_grpo", code), *as_flags(settings["run"]), fsdp=fsdp)
    (saved,) = saved_steps(tmp_path / "run")
    assert saved in (1, 2, 3)
    os.rename(gone + ".moved", gone)
    launch(training_code("train_grpo"), *as_flags(settings["run"]), "--resume=True", fsdp=fsdp)
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)


@pytest.mark.slow
def test_metrics_that_one_process_cannot_write_stop_and_save_both(folder, tmp_path, own_data):
    """At a step that is due for saving anyway; the other process must not hang."""
    settings = config("train_grpo", folder, tmp_path / "run", **own_data)
    log = str(tmp_path / "run" / "metrics.jsonl")
    code = AT_STEP.format(step=2, action=f"os.remove({log!r}); os.mkdir({log!r})")
    with pytest.raises(AssertionError, match="Is a directory"):
        launch(training_code("train_grpo", code), *as_flags(settings))
    assert saved_steps(tmp_path / "run") == [3]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_a_held_out_clip_that_one_process_cannot_read_stops_and_saves_both(folder, tmp_path, own_data, fsdp):
    """In the evaluation of the final model, when samples are due as well."""
    rows = [json.loads(line) for line in open(folder / "test.jsonl")][:4]
    for n, row in enumerate(rows):
        row["audio"] = str(tmp_path / f"{n}.wav")
        shutil.copy(folder / "test" / f"000{n}.wav", row["audio"])
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = own_data | dict(eval_data=str(tmp_path / "test.jsonl"), eval_every=100, samples_every=5)
    code = AT_STEP.format(step=4, action=f"open({str(tmp_path / '1.wav')!r}, 'w').close()")
    settings = config("train_grpo", folder, tmp_path / "run", **flags)
    with pytest.raises(AssertionError, match="1.wav: cannot be read as audio"):
        launch(training_code("train_grpo", code), *as_flags(settings), fsdp=fsdp)
    assert saved_steps(tmp_path / "run") == [5]
