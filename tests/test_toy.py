import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, metrics, load_examples

import evaluate
import toy
import train_grpo
import train_sft
from data import load_audio
from flags import parse


def command(cwd, *words):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True)


def test_the_data_is_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        toy.make_data(tmp_path / name, "test", 12, seed=2)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 13
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_questions_are_of_mmaus_three_kinds_and_cannot_be_guessed_from_the_place(folder):
    kinds, places = defaultdict(set), set()
    for example in load_examples(str(folder / "train.jsonl")):
        kinds[example.row["task"]].add(example.row["kind"])
        places.add(example.choices.index(example.answer))
        assert len(set(example.choices)) == 4
    assert {task: len(found) for task, found in kinds.items()} == {"sound": 2, "music": 2, "speech": 2}
    assert places == {0, 1, 2, 3}


def test_train_and_test_share_no_clip(folder):
    clips = [path.read_bytes() for split in ("train", "test") for path in (folder / split).iterdir()]
    assert len(set(clips)) == 36


@pytest.fixture
def toy_run(tmp_path, monkeypatch):
    """toy_flags in a folder where a toy was made and trained, for these words on the command line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/toy/base").mkdir(parents=True)
    (tmp_path / "runs/toy/grpo/checkpoint-200").mkdir(parents=True)
    monkeypatch.setattr(toy, "make", lambda: pytest.fail("made it again"))

    def flags(*words, processes=1):
        accelerator = SimpleNamespace(
            num_processes=processes, is_main_process=True, wait_for_everyone=lambda: None
        )
        monkeypatch.setattr(toy, "Accelerator", lambda: accelerator)
        monkeypatch.setattr("sys.argv", ["train_grpo.py", *words])
        under = toy.toy_flags("grpo", parse(train_grpo.Config, "", list(words)))
        return parse(train_grpo.Config, "", under + list(words))

    return flags


def test_a_second_run_reuses_the_toy_and_clears_the_first(tmp_path, toy_run, capsys):
    config = toy_run()
    assert (config.model, config.data, config.lr) == ("runs/toy/base", "runs/toy/train.jsonl", 4e-4)
    assert "offline toy" in capsys.readouterr().out
    assert not (tmp_path / "runs/toy/grpo").exists()


@pytest.mark.parametrize("words", [["--resume"], ["--output", "elsewhere"], ["--output=elsewhere"]], ids=str)
def test_a_run_that_goes_on_or_elsewhere_clears_nothing(tmp_path, toy_run, words):
    assert toy_run(*words).output == ("runs/toy/grpo" if "--resume" in words else "elsewhere")
    assert (tmp_path / "runs/toy/grpo/checkpoint-200").exists()


def test_own_flags_go_on_top_of_the_toys(toy_run):
    changed = dict(beta=0.0, max_steps=50, prompts_per_step=8, seed=1)
    config = toy_run(*(f"--{name}={value}" for name, value in changed.items()))
    assert {name: getattr(config, name) for name in changed} == changed
    assert (config.lr, config.max_new_tokens, config.model, config.micro_batch) == (
        4e-4,
        16,
        "runs/toy/base",
        8,
    )


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 20])
def test_the_toy_runs_on_any_number_of_processes(toy_run, processes):
    config = toy_run(processes=processes)
    assert config.prompts_per_step % (processes * config.micro_batch) == 0


@pytest.mark.parametrize("script", ["train_grpo", "train_sft"])
@pytest.mark.parametrize(
    "words, is_toy",
    [([], True), (["--seed", "1"], True), (["--model", "x"], False), (["--data=x"], False)],
    ids=str,
)
def test_the_toy_is_for_who_names_neither_model_nor_data(monkeypatch, script, words, is_toy):
    module = {"train_grpo": train_grpo, "train_sft": train_sft}[script]
    configs = []
    monkeypatch.setattr(module, "train", configs.append)
    monkeypatch.setattr(
        toy, "toy_flags", lambda method, config: ["--model", f"toy for {method}", "--seed", "7"]
    )
    monkeypatch.setattr("sys.argv", [f"{script}.py", *words])
    module.main()
    (config,) = configs
    assert (config.model == f"toy for {script.removeprefix('train_')}") is is_toy
    assert config.seed == (1 if "--seed" in words else 7 if is_toy else 42)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--seeds", "1"], "error: unknown flag or value: --seeds 1 (--help lists the flags)"),
        (["--model", "x"], "error: --data is missing: the file of training questions"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_a_toy_is_made(tmp_path, words, says):
    done = command(tmp_path, ROOT / "train_grpo.py", *words)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == says
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_grpo_teaches_the_toy(tmp_path):
    """The README's first command, then an evaluation of what it made."""
    launched = command(tmp_path, "-m", "accelerate.commands.launch", ROOT / "train_grpo.py")
    assert launched.returncode == 0, launched.stderr[-3000:]
    before, after = map(
        float, re.search(r"held-out accuracy: ([\d.]+)% at first, ([\d.]+)% after", launched.stdout).groups()
    )
    print(f"toy: {before} % before, {after} % after")
    assert 35 <= before <= 65 and after - before >= 20
    lines = metrics(tmp_path / "runs/toy/grpo")
    assert (
        len(lines) == 401
        and abs(lines[0]["kl"]) < 1e-6
        and lines.pop()["eval_accuracy"] * 100 == pytest.approx(after, abs=0.05)
    )
    assert sum(line["reward"] for line in lines[-20:]) > sum(line["reward"] for line in lines[:20]) + 5
    assert os.listdir(tmp_path / "runs/toy/base") and not (tmp_path / "runs/toy/init").exists()

    flags = (
        "--model runs/toy/grpo --data runs/toy/test.jsonl --output runs/toy/eval --max_new_tokens 16".split()
    )
    evaluated = command(tmp_path, ROOT / "evaluate.py", *flags)
    assert re.search(rf"overall +{after}%", evaluated.stdout), evaluated.stdout + evaluated.stderr[-3000:]


@pytest.mark.parametrize("script", ["train_grpo.py", "train_sft.py", "evaluate.py"])
def test_bad_input_ends_in_one_line_and_a_status(tmp_path, script):
    (tmp_path / "bad.jsonl").write_text('{"audio": "a.wav"}\n')
    done = command(tmp_path, ROOT / script, "--data", "bad.jsonl")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "error: bad.jsonl:1: no question (key 'question')"
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl"]


@pytest.mark.parametrize("script", ["train_grpo.py", "train_sft.py", "evaluate.py"])
def test_help_explains_every_flag_with_its_default(script):
    done = command(ROOT, script, "--help")
    flags = re.split(r"\n  (?=--)", done.stdout.split("options:")[1])[1:]
    assert done.returncode == 0 and len(flags) >= 8
    assert all("(default:" in flag for flag in flags), [flag for flag in flags if "(default:" not in flag]


def test_shifted_questions_are_unlike_any_in_training(tmp_path):
    toy.make_data(tmp_path, "plain", 24, seed=3)
    toy.make_data(tmp_path, "shifted", 24, seed=3, shifts=toy.SHIFTS)
    plain, shifted = (load_examples(str(tmp_path / f"{split}.jsonl")) for split in ("plain", "shifted"))
    assert {example.row["shift"] for example in shifted} == set(toy.SHIFTS)
    asked = {way for _, ways, _ in toy.KINDS.values() for way in ways}
    for i, example in enumerate(shifted):
        shift, wave = example.row["shift"], load_audio(example.audio)
        assert (example.question in asked) == (shift != "rephrased")
        assert example.answer in toy.KINDS[example.row["kind"]][2]
        assert {"slow": 22_000 < len(wave), "fast": len(wave) < 27_000}.get(shift, len(wave) <= 32_000)
        if i == 0:  # drawn alike up to the first shift: the same sound, a fifth longer and as much lower
            before = load_audio(plain[0].audio)
            assert len(wave) == pytest.approx(1.2 * len(before), rel=1e-3)
            peak, peak_before = (np.abs(np.fft.rfft(w)).argmax() / len(w) for w in (wave, before))
            assert peak == pytest.approx(peak_before / 1.2, rel=0.01)


def test_the_comparison_runs_each_method_with_each_seed_and_reuses_what_is_there(
    tmp_path, monkeypatch, capsys
):
    """With the scripts replaced by what they would leave behind; their flags are parsed by the real
    settings.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/toy/base").mkdir(parents=True)
    monkeypatch.setattr(toy, "N_TEST", 24)
    ran = []

    def run_script(name, flags):
        module = {"train_sft.py": train_sft, "train_grpo.py": train_grpo, "evaluate.py": evaluate}[name]
        settings = parse(module.Config, "", flags.split())
        ran.append((name, settings))
        os.makedirs(settings.output, exist_ok=True)
        if name == "evaluate.py":
            (Path(settings.output) / "results.json").write_text(
                json.dumps({"accuracy": 0.5 + 0.01 * len(ran)})
            )
        else:
            (Path(settings.output) / "run.json").touch()

    monkeypatch.setattr(toy, "run_script", run_script)
    toy.compare()
    trained = [(name, settings) for name, settings in ran if name != "evaluate.py"]
    assert len(trained) == 15 and len(ran) == 15 + 32
    assert {(settings.max_steps, settings.prompts_per_step) for _, settings in trained} == {
        (400, 16)
    }  # the same samples seen
    assert [settings.seed for _, settings in trained] == [1, 2, 3] * 5
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| base",
        *(f"| {method}" for method in toy.COMPARED),
    ]
    assert (
        rows[2] == "| base | 51.0 | 52.0 |"
        and rows[3] == "| full SFT | 57.0 (54.0 to 60.0) | 58.0 (55.0 to 61.0) |"
    )
    before = len(ran)
    toy.compare()
    assert len(ran) == before


def test_an_unknown_command_is_refused():
    done = command(ROOT, "toy.py", "compete")
    assert done.returncode == 2 and "invalid choice: 'compete'" in done.stderr
