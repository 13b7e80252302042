"""The offline toy: its questions and sounds, its role in the scripts, and that GRPO improves it."""

import os
import re
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
from conftest import ROOT, load_examples, metrics

import toy
import train_grpo
import train_sft
from cli import BadInput, parse
from data import load_audio


def command(cwd, *words):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True)


# ---------------------------------------------------------------- questions and sounds


def test_the_data_is_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        toy.make_data(tmp_path / name, "test", 12, seed=2)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 13
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_questions_cover_three_tasks_and_cannot_be_guessed_from_the_place_of_the_answer(folder):
    kinds = defaultdict(set)
    places = set()
    for example in load_examples(str(folder / "train.jsonl")):
        kinds[example.row["task"]].add(example.row["kind"])
        places.add(example.choices.index(example.answer))
        assert len(set(example.choices)) == 4
    assert {task: len(found) for task, found in kinds.items()} == {"sound": 2, "music": 2, "speech": 2}
    assert places == {0, 1, 2, 3}


def test_a_thought_leads_to_one_answer():
    for kind, (_, _, answers) in toy.KINDS.items():
        assert len({toy.THOUGHTS[answer] for answer in answers}) == len(answers), kind


def test_a_clip_has_as_many_beeps_as_its_answer_and_thought_say(folder):
    for example in load_examples(str(folder / "train.jsonl")):
        assert example.thought == toy.THOUGHTS[example.answer]
        if example.row["kind"] == "count":
            loudness = np.abs(load_audio(example.audio)).reshape(-1, 800).mean(1)
            is_loud = loudness > loudness.max() / 2
            beeps = (is_loud & ~np.roll(is_loud, 1)).sum()
            assert beeps == example.thought.count("beep") == 1 + toy.COUNTS.index(example.answer)


def test_train_and_test_share_no_clip(folder):
    clips = [path.read_bytes() for split in ("train", "test") for path in (folder / split).iterdir()]
    assert len(set(clips)) == 36


# ---------------------------------------------------------------- its role in the scripts


@pytest.fixture
def start(tmp_path, monkeypatch):
    """The settings a script would train with, in a folder where a toy was already made and trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/toy/base").mkdir(parents=True)
    (tmp_path / "runs/toy/grpo/checkpoint-200").mkdir(parents=True)

    def start(module, *words):
        configs = []
        monkeypatch.setattr(module, "train", configs.append)
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *words])
        module.main()
        return configs[0]

    return start


@pytest.mark.parametrize("module", [train_grpo, train_sft], ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    "words, model",
    [
        ([], "runs/toy/base"),
        (["--seed", "1"], "runs/toy/base"),
        (["--model", "x"], "x"),
        (["--data=x"], "Qwen/Qwen2-Audio-7B-Instruct"),
    ],
    ids=str,
)
def test_without_model_and_data_it_is_the_toy(start, module, words, model):
    assert start(module, *words).model == model


def test_a_second_run_uses_the_toy_again_and_replaces_the_first(start, tmp_path, capsys):
    config = start(train_grpo)
    assert (config.data, config.eval_data) == ("runs/toy/train.jsonl", "runs/toy/test.jsonl")
    assert (config.lr, config.output) == (4e-4, "runs/toy/grpo")
    out = capsys.readouterr().out
    assert "this is the offline toy" in out and "making it" not in out
    assert "train_grpo.py --model runs/toy/base --data runs/toy/train.jsonl" in out
    assert not (tmp_path / "runs/toy/grpo").exists()


@pytest.mark.parametrize("words", [["--resume"], ["--output", "elsewhere"], ["--output=elsewhere"]], ids=str)
def test_a_resumed_run_or_one_elsewhere_removes_nothing(start, tmp_path, words):
    assert start(train_grpo, *words).output == ("runs/toy/grpo" if words == ["--resume"] else "elsewhere")
    assert (tmp_path / "runs/toy/grpo/checkpoint-200").exists()


def test_own_flags_override_those_of_the_toy(start):
    changed = {"beta": 0.0, "max_steps": 50, "prompts_per_step": 8, "seed": 1}
    config = start(train_grpo, *(f"--{name}={value}" for name, value in changed.items()))
    assert {name: getattr(config, name) for name in changed} == changed
    assert (config.lr, config.max_new_tokens, config.micro_batch) == (4e-4, 16, 8)


def test_each_flag_is_named_once(start, capsys):
    start(train_grpo, "--prompts_per_step", "8", "--skip_steps", "1", "2", "--lr=1e-3")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train_grpo.py"))
    flags = [word for word in line.split() if word.startswith("--")]
    assert len(flags) == len(set(flags))
    assert "--prompts_per_step 8" in line and "--skip_steps 1 2" in line and "--lr 1e-3" in line


def test_thinking_starts_from_a_model_that_has_seen_thoughts(start, monkeypatch):
    warm_ups = []

    def run_script(name, flags):
        config = parse(train_sft.Config, "", flags.split())
        os.makedirs(config.output)
        warm_ups.append((name, config.prompt, config.model))

    monkeypatch.setattr(toy, "run_script", run_script)
    assert start(train_grpo).model == start(train_sft, "--prompt=think").model == "runs/toy/base"
    assert not warm_ups
    for _ in range(2):  # the second run finds the thinker
        config = start(train_grpo, "--prompt=think")
        assert (config.model, config.max_new_tokens) == ("runs/toy/thinker", 48)
        assert warm_ups == [("train_sft.py", "think", "runs/toy/base")]
        assert os.path.isdir("runs/toy/thinker")


@pytest.mark.parametrize(
    "processes, prompts_per_step, micro_batch", [(1, 16, 16), (2, 16, 8), (3, 15, 5), (20, 20, 1)]
)
def test_any_number_of_processes_shares_a_step(processes, prompts_per_step, micro_batch):
    config = parse(train_grpo.Config, "", toy.batch_flags(16, processes).split())
    assert (config.prompts_per_step, config.micro_batch) == (prompts_per_step, micro_batch)


def test_a_script_runs_alone_shares_the_cores_and_leaves_a_log(tmp_path, monkeypatch):
    """Even when it is started by one of several processes; it fails, and the log has the reason."""
    script = tmp_path / "show.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "os.cpu_count = lambda: 12\n"
        "import torch; torch.cuda.is_available = lambda: True\n"  # the same with a GPU
        "from cli import BadInput, run_main\n"
        "def main(): raise BadInput(f\"{torch.get_num_threads()} threads, rank {os.environ.get('RANK')}\")\n"
        "run_main(main)\n"
    )
    monkeypatch.setenv("RANK", "1")
    log = tmp_path / "log"
    with pytest.raises(BadInput, match=f"show.py failed: see {log}$"):
        toy.run_script(str(script), "", str(log), share=4)
    assert log.read_text() == "error: 3 threads, rank None\n"


# ---------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    "script, words, message",
    [
        ("train_grpo.py", "--seeds 1", "unknown flag or value: --seeds 1 (--help lists the flags)"),
        ("train_grpo.py", "--model x", "--data is missing: the file of training questions"),
        ("train_grpo.py", "--data bad.jsonl", "bad.jsonl:1: no question (key 'question')"),
        ("train_sft.py", "--data bad.jsonl", "bad.jsonl:1: no question (key 'question')"),
        ("evaluate.py", "--data bad.jsonl", "bad.jsonl:1: no question (key 'question')"),
    ],
)
def test_bad_input_ends_in_one_line_and_makes_no_file(tmp_path, script, words, message):
    (tmp_path / "bad.jsonl").write_text('{"audio": "a.wav"}\n')
    done = command(tmp_path, ROOT / script, *words.split())
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == f"error: {message}"
    assert os.listdir(tmp_path) == ["bad.jsonl"]


@pytest.mark.parametrize("script", ["train_grpo.py", "train_sft.py", "evaluate.py"])
def test_help_explains_every_flag_with_its_default(script):
    done = command(ROOT, script, "--help")
    flags = re.split(r"\n  (?=--)", done.stdout.split("options:")[1])[1:]
    assert done.returncode == 0 and len(flags) >= 8
    assert [flag for flag in flags if "(default:" not in flag] == []


def test_an_argument_that_toy_does_not_have_makes_nothing(tmp_path):
    done = command(tmp_path, ROOT / "toy.py", "compare")
    assert done.returncode == 2 and "unrecognized arguments: compare" in done.stderr
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------- training


@pytest.mark.slow
def test_grpo_teaches_the_toy(tmp_path):
    """The README's first command, then an evaluation of the model that it trained."""
    launched = command(tmp_path, "-m", "accelerate.commands.launch", ROOT / "train_grpo.py")
    assert launched.returncode == 0, launched.stderr[-3000:]
    output = launched.stdout + launched.stderr
    accuracies = dict(re.findall(r"step (\d+): held-out accuracy ([\d.]+)%", output))
    before, after = float(accuracies["0"]), float(accuracies["400"])
    print(f"toy: {before} % before, {after} % after")
    assert 35 <= before <= 65 and after - before >= 20

    lines = metrics(tmp_path / "runs/toy/grpo")
    steps = [line for line in lines if "reward" in line]
    evaluations = [line for line in lines if "eval_accuracy" in line]
    assert len(steps) == 400 and abs(steps[0]["kl"]) < 1e-6
    assert [line["step"] for line in evaluations] == list(range(0, 401, 50))
    assert evaluations[-1]["eval_accuracy"] * 100 == pytest.approx(after, abs=0.05)
    first, last = (np.mean([line["reward"] for line in part]) for part in (steps[:20], steps[-20:]))
    assert last > first + 0.25
    assert os.listdir(tmp_path / "runs/toy/base") and not (tmp_path / "runs/toy/init").exists()

    flags = "--model runs/toy/grpo --data runs/toy/test.jsonl --output runs/toy/eval --max_new_tokens 16"
    evaluated = command(tmp_path, ROOT / "evaluate.py", *flags.split())
    assert re.search(rf"overall +{after}%", evaluated.stdout), evaluated.stdout + evaluated.stderr[-3000:]
