"""The comparison on the toy: which runs it makes, that it can be interrupted, its tables and its picture."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT

import evaluate
import toy
import train_grpo
import train_sft
from cli import BadInput, parse
from tools import compare

TASKS = ["sound", "music", "speech"]
CONFIGS = {
    "train_sft.py": train_sft.Config,
    "train_grpo.py": train_grpo.Config,
    "evaluate.py": evaluate.Config,
}

# ---------------------------------------------------------------- the runs


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Replaces the scripts with fakes that only write the results; their flags are parsed for real.

    The base gets 50 % of the sound questions right, a run 60 + 10 * lr / 1e-4 + seed, and music and
    speech get a half and a quarter of that. `calls` lists each script and its settings. After 20 scripts an
    exception in `failure` is raised, once; the scripts after it are slow, so that they can be cancelled.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/toy/base").mkdir(parents=True)
    toy.make_data("runs/toy", "train", 24, seed=1)
    monkeypatch.setattr(compare, "N_TEST", 2)
    state = SimpleNamespace(calls=[], failure=None, delay=0)
    lock = threading.Lock()

    def run_script(name, flags, log, share):
        settings = parse(CONFIGS[name], "", flags.split())
        time.sleep(state.delay)
        with lock:
            if state.failure and len(state.calls) == 20:
                failure, state.failure, state.delay = state.failure, None, 0.3
                raise failure
            state.calls.append((name, settings))
        output = Path(settings.output)
        output.mkdir(parents=True)  # the scripts refuse an output that exists
        if name != "evaluate.py":
            (output / "config.json").write_text(json.dumps({"lr": settings.lr, "seed": settings.seed}))
            return
        score = 50
        if settings.model != "runs/toy/base":
            run = json.loads((Path(settings.model) / "config.json").read_text())
            score = 60 + 10 * run["lr"] / 1e-4 + run["seed"]
        accuracies = {"sound": score / 100, "music": score / 200, "speech": score / 400}
        by_task = {task: {"accuracy": accuracy} for task, accuracy in accuracies.items()}
        (output / "results.json").write_text(json.dumps({"by": {"task": by_task}}))

    monkeypatch.setattr(compare, "run_script", run_script)
    return state


def trainings(scripts):
    return [(name, settings) for name, settings in scripts.calls if name != "evaluate.py"]


def test_each_method_is_trained_on_one_task_and_measured_on_all(scripts, capsys):
    compare.compare(task="music")
    assert len(scripts.calls) == 45 + 46  # trained; measured, including the base
    designs = Counter()
    settings_of_all = set()
    runs = set()
    for name, run in trainings(scripts):
        beta = getattr(run, "beta", None)
        designs[name, bool(run.lora_rank), beta] += 1
        runs.add((name, run.lora_rank, beta, run.lr, run.seed))
        settings_of_all.add((run.model, run.data, run.max_steps, run.prompts_per_step, run.resume))
    assert len(runs) == 45
    assert settings_of_all == {("runs/toy/base", "runs/toy/train-music.jsonl", 300, 16, True)}
    assert designs == {
        ("train_sft.py", False, None): 9,
        ("train_sft.py", True, None): 9,
        ("train_grpo.py", False, 0.04): 9,
        ("train_grpo.py", False, 0.2): 9,
        ("train_grpo.py", True, 0.04): 9,
    }
    rows = [json.loads(line) for line in open("runs/toy/train-music.jsonl")]
    assert len(rows) == 8 and {row["task"] for row in rows} == {"music"}

    out = capsys.readouterr().out.splitlines()
    assert "| accuracy in % | lr | music (trained) | sound | speech | the other two |" in out
    assert "| base | | 25.0 | 50.0 | 12.5 | 31.2 |" in out
    cells = "33.5 (33.0 to 34.0) | 67.0 (66.0 to 68.0) | 16.8 (16.5 to 17.0) | 41.9 (41.2 to 42.5)"
    assert f"| GRPO | 5e-5 | {cells} |" in out
    assert "plot saved to runs/toy/compare/music/compare.svg" in out
    assert ElementTree.parse("runs/toy/compare/music/compare.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    "failure, message",
    [
        (BadInput("train_sft.py failed"), "train_sft.py failed"),
        (KeyboardInterrupt(), "interrupted; run the same command again to continue"),
    ],
    ids=["failure", "ctrl-c"],
)
def test_an_interrupted_comparison_starts_nothing_more_and_continues(scripts, failure, message):
    scripts.failure = failure
    with pytest.raises(BadInput, match=message):
        compare.compare()
    assert 20 <= len(scripts.calls) < 50
    half_done = Path("runs/toy/compare/sound/base")
    half_done.mkdir()
    (half_done / "predictions.json").touch()  # left by an evaluation that was killed

    scripts.delay = 0
    compare.compare()
    outputs = Counter(settings.output for _, settings in scripts.calls)
    assert len(outputs) == 45 + 46 and set(outputs.values()) == {1}
    compare.compare()
    assert len(scripts.calls) == 45 + 46


def test_the_quick_comparison_has_one_seed_and_its_own_folder(scripts, capsys):
    compare.compare(quick=True)
    assert len(scripts.calls) == 15 + 16
    assert {(run.seed, run.max_steps) for _, run in trainings(scripts)} == {(1, 150)}
    assert all("compare/sound-quick/" in settings.output for _, settings in scripts.calls)
    assert "\n| GRPO, LoRA minus LoRA SFT | +0.0 | +0.0 | +0.0 | +0.0 |" in capsys.readouterr().out


def test_an_unknown_task_is_refused(tmp_path):
    command = [sys.executable, "-m", "tools.compare", "--task", "singing"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "argument --task: invalid choice: 'singing' (choose from" in done.stderr
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------- tables and picture


@pytest.mark.parametrize(
    "skills, chosen",
    [
        ((94, 96, 99), 1),
        ((95, 99, 96), 0),  # just enough
        ((99, 80, 100), 0),  # the lowest rate, although another is better
        ((80, 94, 90), 1),  # none is skilled: then the best one
        ((90, 94, 94), 1),  # of two equally good ones, the lower rate
    ],
    ids=str,
)
def test_runs_of_equal_skill_are_chosen_by_the_trained_task_alone(skills, chosen):
    scores = np.random.default_rng(0).uniform(0, 100, (3, 5, 3, 4))
    scores[..., 0] = 100
    scores[1, 2, :, 0] = skills
    found = compare.choose_at_equal_skill(scores)
    assert found[1, 2].tolist() == scores[1, 2, chosen].tolist()
    assert found[0, 2].tolist() == scores[0, 2, 0].tolist()  # each seed and method on its own


def test_learning_rates_are_listed_in_ascending_order():
    for name, method in compare.METHODS.items():
        rates = [float(rate) for rate in method.rates]
        assert rates == sorted(rates), name


def test_differences_are_paired_over_seeds_with_a_t_interval():
    scores = np.full((3, 5, 3, 4), 97.0)
    names = list(compare.METHODS)
    grpo, sft = names.index("GRPO"), names.index("full SFT")
    for seed, (sft_score, grpo_score) in enumerate([(10, 11), (30, 32), (50, 53)]):
        scores[seed, sft, :, 3] = sft_score
        scores[seed, grpo, :, 3] = grpo_score
    lines = compare.difference_table(TASKS, scores)
    # 1, 2 and 3 more: mean 2, standard deviation 1, t(0.975, 2) = 4.3027, so 2 -+ 4.3027 / sqrt(3)
    equal = "+0.0 (+0.0 to +0.0)"
    assert f"| GRPO minus full SFT | {equal} | {equal} | {equal} | +2.0 (-0.5 to +4.5) |" in lines

    scores[0, grpo, :, 0] = 94  # one seed stays below
    lines = compare.difference_table(TASKS, scores)
    noted = [line.split(" | ")[0] for line in lines if "not all at 95 %" in line]
    assert noted == ["| GRPO minus full SFT, not all at 95 %"]


def test_one_seed_has_no_range_and_no_interval():
    scores = np.full((1, 5, 3, 4), 97.0)
    scores[:, list(compare.METHODS).index("GRPO")] = 80
    assert "| GRPO | 5e-5 | 80.0 | 80.0 | 80.0 | 80.0 |" in compare.accuracy_table(TASKS, np.zeros(4), scores)
    differences = compare.difference_table(TASKS, scores)
    assert "| GRPO minus full SFT, not all at 95 % | -17.0 | -17.0 | -17.0 | -17.0 |" in differences
    assert "| GRPO, beta 0.2 minus full SFT | +0.0 | +0.0 | +0.0 | +0.0 |" in differences


def test_the_picture_has_a_point_per_run_and_a_line_per_method():
    scores = np.random.default_rng(0).uniform(0, 100, (3, 5, 3, 4))
    (axes,) = compare.draw(TASKS, np.array([65.0, 60, 20, 40]), scores).axes
    star, *lines = [line.get_xydata() for line in axes.lines]
    assert star.tolist() == [[65, 40]] and len(lines) == 10
    for method in range(5):
        points, means = lines[2 * method], lines[2 * method + 1]
        runs = scores[:, method][..., [0, 3]]  # (seeds, learning rates, 2)
        assert sorted(points.tolist()) == sorted(runs.reshape(-1, 2).tolist())
        assert means == pytest.approx(runs.mean(0))
    assert [text.get_text() for text in axes.get_legend().texts] == ["base", *compare.METHODS]
