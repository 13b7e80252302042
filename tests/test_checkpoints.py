"""Runs that stop and resume, in one process and in two."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SGD, as_flags, assert_same_run, launch, metrics, run_script, training_code, weights
from conftest import config as short_config

from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints import list_states
from cli import BadInput
from model import load_model

pytestmark = pytest.mark.usefixtures("reward_odd_lengths")


def settings(folder, **flags):
    """Settings for a five-step run that saves and evaluates every other step."""
    held_out = dict(eval_data=str(folder / "test.jsonl"), eval_every=2)
    return held_out | dict(micro_batch=2, max_steps=5, save_every=2) | flags


def config(script, folder, output, **flags):
    return short_config(script, folder, output, **settings(folder, **flags))


def train(script, folder, output, **flags):
    run_script(script, folder, output, **settings(folder, **flags))


def undo(whole, output, step):
    """Copy a finished run so that it looks killed some time after checkpoint-<step>, with all its states."""
    shutil.copytree(whole, output)
    for path in output.iterdir():
        if path.is_file() and path.name not in ("metrics.jsonl", "samples.jsonl"):
            path.unlink()
        elif path.name.startswith("checkpoint-") and int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    for path in output.glob("*.jsonl"):
        with open(path, "a") as file:
            file.write('{"step": 5, "rew')  # half a line


@pytest.mark.parametrize(
    "script, flags",
    [
        ("train_grpo", dict(num_iterations=2, samples_every=1)),
        ("train_grpo", dict(lora_rank=2, lora_dropout=0.5, samples_every=2)),
        ("train_sft", {}),
        ("train_sft", dict(train=["projector", "language"], gradient_checkpointing=True)),
    ],
    ids=["GRPO", "GRPO with LoRA and dropout", "SFT", "SFT, frozen encoder"],
)
def test_a_resumed_run_is_the_run_that_never_stopped(folder, tmp_path, capsys, script, flags):
    flags |= dict(keep_states=9)
    train(script, folder, tmp_path / "whole", **flags)
    for step in (2, 4):
        undo(tmp_path / "whole", tmp_path / f"from {step}", step)
        train(script, folder, tmp_path / f"from {step}", resume=True, **flags)
        assert_same_run(tmp_path / "whole", tmp_path / f"from {step}", exact=True)
        samples, again = (tmp_path / name / "samples.jsonl" for name in ("whole", f"from {step}"))
        assert samples.exists() == again.exists() == (script == "train_grpo")
        assert not samples.exists() or samples.read_bytes() == again.read_bytes()
    with pytest.raises(SystemExit) as status:  # a finished run is left as it is
        train(script, folder, tmp_path / "whole", resume=True, **flags)
    assert not status.value.code and "is finished" in capsys.readouterr().out


def test_a_checkpoint_is_a_model_and_a_state_without_pickle(folder, tmp_path):
    train("train_sft", folder, tmp_path / "run", max_steps=6)
    states = [Path(path).name for path in list_states(str(tmp_path / "run"))]
    assert states == ["checkpoint-6"]  # only the newest
    for step in (2, 4, 6):
        load_model(str(tmp_path / "run" / f"checkpoint-{step}"))
    kinds = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"}
    assert kinds - {".patch"} == {".safetensors", ".json", ".jsonl", ".jinja"}
    assert not list(tmp_path.rglob("*.partial"))


def test_what_a_killed_save_left_is_no_checkpoint(folder, tmp_path, capsys):
    train("train_sft", folder, tmp_path / "whole", keep_states=9)
    undo(tmp_path / "whole", tmp_path / "run", 4)
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-5.partial")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4" / "state")
    train("train_sft", folder, tmp_path / "run", keep_states=9, resume=True)
    assert "continuing from" in (out := capsys.readouterr().out) and "checkpoint-2" in out
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)


KILLED_EARLY = {"metrics.jsonl": "", "checkpoint-2.partial/config.json": ""}
OTHER_FOLDERS = {
    "of another tool": {"metrics.jsonl": "{}", "notes.txt": ""},
    "states deleted for space": {"metrics.jsonl": "{}", "checkpoint-2/config.json": "{}"},
}


def make_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)


@pytest.mark.parametrize("files", OTHER_FOLDERS.values(), ids=OTHER_FOLDERS)
def test_resume_empties_no_folder(folder, tmp_path, files):
    make_folder(tmp_path / "run", files)
    with pytest.raises(BadInput, match="run has no complete checkpoint, but has (notes.txt|checkpoint-2)"):
        train("train_sft", folder, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}"


def test_resume_starts_a_run_that_was_killed_before_its_first_checkpoint(folder, tmp_path):
    make_folder(tmp_path / "run", KILLED_EARLY)
    train("train_sft", folder, tmp_path / "run", resume=True, max_steps=1)
    train("train_sft", folder, tmp_path / "empty", resume=True, max_steps=1)
    assert_same_run(tmp_path / "empty", tmp_path / "run", exact=True)


def test_another_precision_is_refused(folder, tmp_path):
    train("train_sft", folder, tmp_path / "run", save_every=2, max_steps=3, eval_data="")
    (tmp_path / "run" / "config.json").unlink()  # as if killed before the end
    state = tmp_path / "run" / "checkpoint-2" / "state" / "state.json"
    state.write_text(state.read_text().replace('"mixed_precision": "no"', '"mixed_precision": "bf16"'))
    with pytest.raises(BadInput, match=r"differ from the saved run's: --mixed_precision no \(was bf16\)"):
        train("train_sft", folder, tmp_path / "run", save_every=2, max_steps=3, eval_data="", resume=True)


def unfinished(folder, tmp_path, script="train_sft", **flags):
    """A run that looks as if it had been killed after checkpoint-2, and the flags that resume it."""
    flags = dict(save_every=2, max_steps=3, eval_data="") | flags
    train(script, folder, tmp_path / "run", **flags)
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    return tmp_path / "run", flags | dict(resume=True)


def change_tensors(change, name="process-0.safetensors"):
    def harm(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, {"format": "pt"})

    return harm


def shorten(tensors):
    name = next(name for name in tensors if name.startswith("exp_avg ") and tensors[name].dim() == 1)
    tensors[name] = tensors[name][:1].clone()


def cut_short(state):
    path = state / "process-0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD_STATES = {  # how to damage the state, and the message
    "cut short": (cut_short, "SafetensorError"),
    "no tensors": (lambda state: (state / "process-0.safetensors").unlink(), "FileNotFoundError"),
    "state of something else": (lambda state: (state / "state.json").write_text("[]"), "TypeError"),
    "a moment is missing": (
        change_tensors(lambda tensors: tensors.pop("exp_avg model.lm_head.weight")),
        "is damaged: its tensors are not those that were saved",
    ),
    "another shape": (change_tensors(shorten), r"is damaged: a tensor has the shape \[1\]"),
    "not finite": (
        change_tensors(lambda tensors: next(iter(tensors.values())).fill_(torch.nan)),
        "nan or inf",
    ),
}


@pytest.mark.parametrize("harm, says", BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_that_cannot_be_used_is_refused(folder, tmp_path, harm, says):
    run, flags = unfinished(folder, tmp_path)
    harm(run / "checkpoint-2" / "state")
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(BadInput, match=f"--resume: .*checkpoint-2/state: .*{says}"):
        train("train_sft", folder, run, **flags)
    assert (run / "metrics.jsonl").read_text() == before


OTHER_RUNS = {  # flags of the resumed run, and the message
    "other flags": (
        dict(lr=1.0, seed=7),
        r"differ from the saved run's: --lr 1.0 \(was 0.01\), --seed 7 \(was 42\)",
    ),
    "adapters": (dict(lora_rank=2), r"--lora_rank 2 \(was 0\)"),
}


@pytest.mark.parametrize("flags, says", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_another_run_is_not_continued(folder, tmp_path, flags, says):
    run, same = unfinished(folder, tmp_path)
    with pytest.raises(BadInput, match=says):
        train("train_sft", folder, run, **same | flags)


def test_questions_are_compared_as_they_were_read(folder, tmp_path):
    """Whether they are edited during a run, or between two runs."""
    shutil.copytree(folder / "train", tmp_path / "train")
    questions = tmp_path / "train.jsonl"
    text = (folder / "train.jsonl").read_text()
    questions.write_text(text)
    run, flags = unfinished(folder, tmp_path, data=str(questions))
    questions.write_text(text * 2)
    with pytest.raises(BadInput, match="is not the file that the run was started with"):
        train("train_sft", folder, run, **flags)
    questions.write_text(text)
    train("train_sft", folder, run, **flags)


@pytest.mark.parametrize("flags", [dict(lora_rank=2), {}], ids=["LoRA", "reference"])
def test_a_changed_base_is_refused(folder, tmp_path, flags):
    def change(weights):
        (name,) = [name for name in weights if name.endswith("layers.1.mlp.up_proj.weight")]
        weights[name] *= 1.01

    shutil.copytree(folder / "model", tmp_path / "model")
    run, flags = unfinished(folder, tmp_path, "train_grpo", model=str(tmp_path / "model"), **flags)
    change_tensors(change, "model.safetensors")(tmp_path / "model")
    with pytest.raises(BadInput, match="does not have the weights that the run was started from"):
        train("train_grpo", folder, run, **flags)


def test_lines_of_metrics_that_a_kill_left_incomplete_are_dropped(folder, tmp_path):
    run, flags = unfinished(folder, tmp_path)
    before = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    damaged = "".join([before[0], "{broken\n", before[1], '{"no": "step"}\n', "[1]\n"])
    (run / "metrics.jsonl").write_bytes(damaged.encode() + b"\xff\xfe\n{half")
    train("train_sft", folder, run, **flags)
    assert [line["step"] for line in metrics(run)] == [0, 1, 2]


def test_an_interrupted_merge_is_done_by_resume(folder, tmp_path, monkeypatch):
    flags = dict(save_every=2, max_steps=3, eval_data="", lora_rank=2, merge=True)
    train("train_sft", folder, tmp_path / "whole", **flags)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("checkpoints.merge", interrupted)
        train("train_sft", folder, tmp_path / "run", **flags)
    train("train_sft", folder, tmp_path / "run", resume=True, **flags)
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)
    one, two = (load_file(tmp_path / name / "merged" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_weights_that_are_nan_are_not_saved(folder, tmp_path, monkeypatch):
    """As after an update with a gradient that is finite, but far too large."""
    step = torch.optim.AdamW.step

    def harm(self, *args, **more):
        step(self, *args, **more)
        with torch.no_grad():
            self.param_groups[0]["params"][0][0] = torch.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", harm)
    with pytest.raises(BadInput, match="nan or inf"):
        train("train_sft", folder, tmp_path / "run", save_every=2, max_steps=2, eval_data="")
    assert not list_states(str(tmp_path / "run")) and not (tmp_path / "run" / "config.json").exists()


# ---------------------------------------------------------------- which code made a run


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def fork(tmp_path):
    """A copy of the scripts with a git history of its own."""
    copy = tmp_path / "fork"
    copy.mkdir()
    for script in ROOT.glob("*.py"):
        shutil.copy(script, copy)
    git(copy, "init", "-q")
    git(copy, "add", ".")
    git(copy, "commit", "-q", "-m", "a")
    return copy


def run_fork(fork, folder, output, *more):
    flags = as_flags(short_config("train_sft", folder, output, max_steps=3, save_every=2))
    command = [sys.executable, "train_sft.py", *flags, *more]
    return subprocess.run(command, cwd=fork, check=True, capture_output=True, text=True).stdout


def test_a_run_records_the_code_that_made_it(fork, folder, tmp_path):
    with open(fork / "train_sft.py", "a") as file:
        file.write("# a change\n")
    (fork / "judge.py").write_text("print(1)\n")
    run_fork(fork, folder, tmp_path / "run")
    (code,) = json.loads((tmp_path / "run" / "code.json").read_text())
    assert (code["step"], code["commit"], code["patch"]) == (
        0,
        git(fork, "rev-parse", "HEAD"),
        "code-0.patch",
    )
    assert code["versions"]["torch"] == torch.__version__ and set(code["versions"]) >= {"peft", "accelerate"}
    git(fork, "stash", "-q", "--include-untracked")
    git(fork, "apply", str(tmp_path / "run" / "code-0.patch"))
    assert (fork / "train_sft.py").read_text().endswith("# a change\n")
    assert (fork / "judge.py").read_text() == "print(1)\n"

    # resumed with other code, it goes on and says so
    (tmp_path / "run" / "config.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-3", ignore_errors=True)
    out = run_fork(fork, folder, tmp_path / "run", "--resume")
    assert "has changed since" not in out
    (tmp_path / "run" / "config.json").unlink()
    (fork / "judge.py").unlink()
    out = run_fork(fork, folder, tmp_path / "run", "--resume")
    assert "--resume: the code or a package has changed since" in out
    first, second = json.loads((tmp_path / "run" / "code.json").read_text())
    assert first == code and (second["step"], second["patch"]) == (2, "code-2.patch")


def test_without_git_nothing_is_recorded_of_the_code(fork, folder, tmp_path):
    shutil.rmtree(fork / ".git")
    run_fork(fork, folder, tmp_path / "run")
    (code,) = json.loads((tmp_path / "run" / "code.json").read_text())
    assert (code["commit"], code["patch"]) == ("", "") and not list((tmp_path / "run").glob("*.patch"))


# ---------------------------------------------------------------- being stopped


def begin(script, settings, limit=""):
    """Start a run in a separate process."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + training_code(script)
    command = ["bash", "-c", f'{limit} exec "$@"', "", sys.executable, "-c", code, *as_flags(settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(process, output, steps):
    """Wait until metrics.jsonl has this many lines, or the process has ended."""
    path = output / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and len(path.read_text().splitlines()) >= steps):
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_leaves(folder, tmp_path, number):
    flags = dict(max_steps=60, save_every=100, eval_data="", lr=1e-3)
    process = begin("train_sft", config("train_sft", folder, tmp_path / "run", **flags))
    wait_for_steps(process, tmp_path / "run", 3)
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == 128 + number, out
    (checkpoint,) = list_states(str(tmp_path / "run"))
    done = int(checkpoint.rsplit("-", 1)[1])
    assert 3 <= done < 60 and f"stopped after {done} of 60 steps" in out and "Traceback" not in out
    train("train_sft", folder, tmp_path / "run", resume=True, **flags)
    train("train_sft", folder, tmp_path / "whole", **flags)
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)


@pytest.mark.slow
def test_a_full_disk_leaves_the_older_checkpoint(folder, tmp_path):
    """A limit on the file size stands in for a full disk."""
    flags = dict(keep_states=2)
    train("train_sft", folder, tmp_path / "run", **flags)
    undo(tmp_path / "run", tmp_path / "full", 2)
    before = {
        path: path.read_bytes() for path in (tmp_path / "full" / "checkpoint-2").rglob("*") if path.is_file()
    }
    process = begin(
        "train_sft", config("train_sft", folder, tmp_path / "full", resume=True, **flags), "ulimit -f 1000;"
    )
    out, _ = process.communicate()
    assert process.returncode == 1 and "checkpoint-4: cannot be saved" in out and "Traceback" not in out, out
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "full" / "checkpoint-2").rglob("*") if path.is_file()
    }
    assert not list((tmp_path / "full").glob("checkpoint-4*"))
    train("train_sft", folder, tmp_path / "full", resume=True, **flags)
    assert_same_run(tmp_path / "run", tmp_path / "full", exact=True)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_loses_nothing(folder, tmp_path):
    flags = dict(max_steps=120, save_every=1, eval_every=100)  # most of the time goes into saving
    train("train_grpo", folder, tmp_path / "whole", **flags)
    chance, kills, lines = random.Random(0), [], tmp_path / "run" / "metrics.jsonl"
    while len(kills) < 20:
        process = begin("train_grpo", config("train_grpo", folder, tmp_path / "run", resume=True, **flags))
        next((line for line in process.stdout if "M parameters" in line), None)  # until the first step begins
        try:
            process.wait(chance.uniform(0, 2))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills.append(len(lines.read_text().splitlines()) if lines.exists() else 0)
    assert len(kills) == 20 and len(set(kills)) > 3, kills  # killed before the end, and at different steps
    train("train_grpo", folder, tmp_path / "run", resume=True, **flags)
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)


# ---------------------------------------------------------------- two processes


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_resume_to_the_bit(folder, tmp_path, fsdp):
    flags = dict(keep_states=9, micro_batch=1)
    launch(
        training_code("train_grpo"),
        *as_flags(config("train_grpo", folder, tmp_path / "whole", **flags)),
        fsdp=fsdp,
    )
    shards = json.loads((tmp_path / "whole" / "checkpoint-2" / "state" / "state.json").read_text())["shards"]
    assert shards == (2 if fsdp else 1)
    undo(tmp_path / "whole", tmp_path / "run", 2)
    launch(
        training_code("train_grpo"),
        *as_flags(config("train_grpo", folder, tmp_path / "run", resume=True, **flags)),
        fsdp=fsdp,
    )
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4], ids=["all weights", "LoRA"])
def test_fsdp2_in_bf16_starts_at_the_reference_and_learns(folder, tmp_path, lora_rank):
    flags = as_flags(config("train_grpo", folder, tmp_path / "run", lr=0.1, lora_rank=lora_rank))
    launch(training_code("train_grpo", SGD), *flags, precision="bf16", fsdp=True)
    lines = [line for line in metrics(tmp_path / "run") if "kl" in line]
    assert lines[0]["kl"] == 0 < lines[-1]["kl"] and all(line["grad_norm"] > 0.01 for line in lines)
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {
        torch.float32 if lora_rank else torch.bfloat16
    }


@pytest.mark.slow
def test_under_fsdp2_processes_may_stop_sampling_at_other_lengths(folder, tmp_path):
    uneven = (
        "plain, rank = train_grpo.sample, Accelerator().process_index\n"
        "def sample(model, inputs, eos_ids, max_new_tokens, *more):\n"
        "    return plain(model, inputs, eos_ids, 2 if rank else max_new_tokens, *more)\n"
        "train_grpo.sample = sample\n"
    )
    flags = as_flags(config("train_grpo", folder, tmp_path / "run", max_steps=3, eval_data=""))
    launch(training_code("train_grpo", uneven), *flags, fsdp=True)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(2 < line["completion_tokens"] < 5 for line in lines)


# ---------------------------------------------------------------- for a GPU


def test_fused_adamw_resumes_to_the_bit(folder, tmp_path, monkeypatch):
    """It needs its step count on the parameter's device; it also exists for the CPU."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, fused, **more: adamw(p, fused=True, **more))
    train("train_sft", folder, tmp_path / "whole", keep_states=9)
    undo(tmp_path / "whole", tmp_path / "run", 2)
    train("train_sft", folder, tmp_path / "run", keep_states=9, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)


def test_lora_gathers_what_is_trained(folder, tmp_path, monkeypatch):
    sizes, plain = [], checkpoints.gathered
    monkeypatch.setattr(checkpoints, "gathered", lambda tensor: sizes.append(tensor.nbytes) or plain(tensor))
    train("train_sft", folder, tmp_path / "run", lora_rank=2, max_steps=1, eval_data="")
    adapters = sum(weight.nbytes for weight in weights(tmp_path / "run").values())
    assert sum(sizes) == adapters < 0.1 * (folder / "model" / "model.safetensors").stat().st_size


def test_what_is_saved_is_flushed_file_by_file(folder, tmp_path, monkeypatch):
    flushed, plain = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(os.fstat(number).st_ino) or plain(number))
    train("train_sft", folder, tmp_path / "run", max_steps=2, eval_data="")
    files = [path for path in (tmp_path / "run" / "checkpoint-2").rglob("*") if path.is_file()]
    assert len(files) > 5 and {path.stat().st_ino for path in files} <= set(flushed)


@pytest.mark.slow
def test_ddp_holds_gradients_once(folder, tmp_path):
    """They are views of DDP's buckets, even after an update: few storages, as large as the weights."""
    code = (
        "plain, seen = train_grpo.log_metrics, []\n"
        "def log_metrics(run, *args):\n"
        "    trained = [p for p in run.model.parameters() if p.requires_grad]\n"
        "    grads = [p.grad for p in trained]\n"
        "    seen.append({g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in grads})\n"
        "    total = 4 * sum(p.numel() for p in trained)\n"
        "    assert all(not g.any() for g in grads) and len(seen[-1]) < len(grads) / 4, len(seen[-1])\n"
        "    assert total <= sum(seen[-1].values()) < 1.1 * total, (total, seen)\n"
        "    assert len(seen) < 3 or seen[-1] == seen[-2], seen\n"
        "    return plain(run, *args)\n"
        "train_grpo.log_metrics = log_metrics\n"
    )
    flags = as_flags(config("train_grpo", folder, tmp_path / "run", eval_data=""))
    launch(training_code("train_grpo", code), *flags)
    assert len(metrics(tmp_path / "run")) == 5
