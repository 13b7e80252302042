import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT, metrics, load_examples

import evaluate
import toy
import train_grpo
import train_sft
from data import BadInput, load_audio
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


def test_a_thought_is_true_and_leads_to_one_answer(folder):
    for kind, (_, _, answers) in toy.KINDS.items():
        assert len({toy.THOUGHTS[answer] for answer in answers}) == len(answers), kind
    for example in load_examples(str(folder / "train.jsonl")):
        assert example.thought == toy.THOUGHTS[example.answer]
        if example.row["kind"] == "count":  # the beeps of the clip: how often it gets loud
            loudness = np.abs(load_audio(example.audio)).reshape(-1, 800).mean(1)
            loud = loudness > loudness.max() / 2
            assert example.thought.count("beep") == (loud & ~np.roll(loud, 1)).sum()


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


def test_thinking_starts_from_a_base_that_has_seen_thoughts(tmp_path, toy_run, monkeypatch):
    warmed = []
    monkeypatch.setattr(toy, "run_script", lambda name, flags: warmed.append((name, flags)))
    monkeypatch.setattr(os, "rename", lambda source, target: os.makedirs(target))
    assert toy_run().model == "runs/toy/base" and not warmed
    config = toy_run("--prompt", "think")
    assert (config.model, config.max_new_tokens, config.prompt) == ("runs/toy/thinker", 48, "think")
    ((name, flags),) = warmed
    start = parse(train_sft.Config, "", flags.split())
    assert (name, start.prompt, start.model) == ("train_sft.py", "think", "runs/toy/base")
    toy_run("--prompt", "think")
    assert len(warmed) == 1  # the second run takes the thinker that is there


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


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """What toy.compare runs, with the scripts replaced by what they would leave behind; their flags are
    parsed by the real settings. The base is right in 50 %, a run in 60 + 10 * lr / 1e-4 + seed.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/toy/base").mkdir(parents=True)
    monkeypatch.setattr(toy, "N_TEST", 8)
    toy.make_data("runs/toy", "train", 24, seed=1)
    monkeypatch.setattr(toy, "make_data", lambda *_, **__: None)
    ran, lock = [], threading.Lock()

    def run_script(name, flags, log, share):
        module = {"train_sft.py": train_sft, "train_grpo.py": train_grpo, "evaluate.py": evaluate}[name]
        settings = parse(module.Config, "", flags.split())
        with lock:
            ran.append((name, settings))
        output = Path(settings.output)
        output.mkdir(parents=True, exist_ok=True)
        if name == "evaluate.py":
            known = {
                str(run.output): 60 + 10 * run.lr / 1e-4 + run.seed for name, run in ran if "train" in name
            }
            x = known.get(settings.model, 50) / 100
            scores = {"sound": x, "music": x / 2, "speech": x / 4}
            by_task = {task: {"accuracy": score} for task, score in scores.items()}
            (output / "results.json").write_text(json.dumps({"by": {"task": by_task}}))
        else:
            (output / "run.json").touch()

    monkeypatch.setattr(toy, "run_script", run_script)
    return ran


def test_the_comparison_trains_each_method_on_one_task_and_measures_it_on_all(comparison, tmp_path, capsys):
    toy.compare(task="music")
    runs = [(name, run) for name, run in comparison if name != "evaluate.py"]
    assert len(runs) == 45 and len(comparison) == 45 + 46
    kinds = Counter((n, bool(r.lora_rank), getattr(r, "beta", None), r.lr, r.seed) for n, r in runs)
    assert len(kinds) == 45
    assert Counter(kind[:3] for kind in kinds) == {
        ("train_sft.py", False, None): 9,
        ("train_sft.py", True, None): 9,
        ("train_grpo.py", False, 0.04): 9,
        ("train_grpo.py", False, 0.2): 9,
        ("train_grpo.py", True, 0.04): 9,
    }
    assert {(run.max_steps, run.prompts_per_step, run.data, run.resume) for _, run in runs} == {
        (300, 16, "runs/toy/train-music.jsonl", True)
    }
    rows = [json.loads(line) for line in open("runs/toy/train-music.jsonl")]
    assert len(rows) == 8 and {row["task"] for row in rows} == {"music"}
    out = capsys.readouterr().out.splitlines()
    assert "| accuracy in % | lr | music (trained) | sound | speech | both others |" in out
    assert "| base | | 25.0 | 50.0 | 12.5 | 31.2 |" in out
    cells = "33.5 (33.0 to 34.0) | 67.0 (66.0 to 68.0) | 16.8 (16.5 to 17.0) | 41.9 (41.2 to 42.5)"
    assert f"| GRPO | 5e-5 | {cells} |" in out
    assert ElementTree.parse(tmp_path / "runs/toy/compare/music/compare.svg").getroot().tag.endswith("svg")


def test_the_comparison_goes_on_where_it_was_interrupted(comparison, monkeypatch):
    run_script = toy.run_script

    def interrupted(*args):
        if len(comparison) > 20:
            raise BadInput("train_sft.py failed")
        run_script(*args)

    monkeypatch.setattr(toy, "run_script", interrupted)
    with pytest.raises(BadInput, match="train_sft.py failed"):
        toy.compare()
    assert 20 < len(comparison) < 30
    monkeypatch.setattr(toy, "run_script", run_script)
    toy.compare()
    outputs = Counter(settings.output for _, settings in comparison)
    assert len(outputs) == 45 + 46 and set(outputs.values()) == {1}
    toy.compare()
    assert len(comparison) == 45 + 46


def test_ctrl_c_in_the_comparison_starts_no_further_run(comparison, monkeypatch):
    def ctrl_c(runs):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "as_completed", ctrl_c)
    run_script = toy.run_script
    monkeypatch.setattr(toy, "run_script", lambda *args: (time.sleep(0.1), run_script(*args)))
    with pytest.raises(BadInput, match="interrupted; the same command goes on"):
        toy.compare()
    assert len(comparison) < 10 + 2 * os.cpu_count()


def test_the_quick_comparison_has_one_seed_and_a_folder_of_its_own(comparison, capsys):
    toy.compare(quick=True)
    assert {run.seed for name, run in comparison if name != "evaluate.py"} == {1}
    assert len(comparison) == 15 + 16
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| GRPO minus full SFT")]
    assert "to" not in last[0]  # one seed has no interval
    assert all("compare/sound-quick/" in settings.output for _, settings in comparison)


def test_an_unknown_task_is_refused():
    with pytest.raises(BadInput, match="--task singing: unknown, choose one of sound, music, speech"):
        toy.compare(task="singing")


def random_scores():
    """Of (3 seeds, 5 methods, 3 learning rates, 4): on both sides of what counts as skilled, with ties."""
    return np.random.default_rng(0).integers(90, 100, (3, 5, 3, 4)).astype(float)


def test_runs_are_compared_at_equal_skill_and_chosen_by_the_trained_task_alone():
    scores = random_scores()
    chosen = toy.at_equal_skill(scores)
    fallbacks = 0
    for seed in range(3):
        for method in range(5):
            runs = scores[seed, method].tolist()  # by rising learning rate
            expected = next((run for run in runs if run[0] >= 95), None)
            if expected is None:
                expected, fallbacks = sorted(runs, key=lambda run: -run[0])[0], fallbacks + 1
            assert chosen[seed, method].tolist() == expected
    assert 0 < fallbacks < 15
    for method, (_, _, rates) in toy.COMPARED.items():
        assert [float(lr) for lr in rates] == sorted(map(float, rates)), method


def test_differences_are_paired_over_seeds_with_a_t_interval():
    scores = np.full((3, 5, 3, 4), 97.0)
    grpo, sft = list(toy.COMPARED).index("GRPO"), list(toy.COMPARED).index("full SFT")
    scores[:, sft, :, 3] = np.array([10, 30, 50])[:, None]
    scores[:, grpo, :, 3] = np.array([11, 32, 53])[:, None]  # 1, 2 and 3 more
    lines = toy.comparison_tables(["sound", "music", "speech"], np.zeros(4), scores)
    (line,) = [line for line in lines if line.startswith("| GRPO minus full SFT |")]
    # the mean is 2, the standard deviation 1, t(0.975, 2) = 4.3027: 2 -+ 4.3027 / sqrt(3)
    assert line.split(" | ")[-1] == "+2.0 (-0.5 to +4.5) |"
    assert line.split(" | ")[1] == "+0.0 (+0.0 to +0.0)"
    scores[0, grpo, :, 0] = 94  # of one seed
    lines = toy.comparison_tables(["sound", "music", "speech"], np.zeros(4), scores)
    assert sum(line.startswith("| GRPO minus full SFT, not all at 95 % |") for line in lines) == 1


def test_one_seed_has_no_range_and_no_interval():
    """As with --quick, where GRPO does not reach the skill that its row would promise."""
    scores = np.full((1, 5, 3, 4), 97.0)
    scores[:, 2] = 80
    lines = toy.comparison_tables(["sound", "music", "speech"], np.zeros(4), scores)
    assert "| GRPO | 5e-5 | 80.0 | 80.0 | 80.0 | 80.0 |" in lines
    assert "| GRPO minus full SFT, not all at 95 % | -17.0 | -17.0 | -17.0 | -17.0 |" in lines
    assert "| GRPO, beta 0.2 minus full SFT | +0.0 | +0.0 | +0.0 | +0.0 |" in lines


def test_the_comparisons_picture_has_a_point_a_run_and_a_line_a_method(tmp_path):
    scores, base = random_scores(), np.array([65.0, 60, 20, 40])
    target = tmp_path / "compare.svg"
    (axes,) = toy.draw_comparison(["sound", "music", "speech"], base, scores, str(target)).axes
    star, *lines = [line.get_xydata() for line in axes.lines]
    assert star.tolist() == [[65, 40]] and len(lines) == 10
    for method in range(5):
        points, means = lines[2 * method], lines[2 * method + 1]
        runs = [(run[0], run[3]) for seed in scores for run in seed[method]]
        assert sorted(map(tuple, points)) == sorted(runs)
        for lr, mean in enumerate(means):
            assert mean == pytest.approx([np.mean([s[method][lr][k] for s in scores]) for k in (0, 3)])
    assert ElementTree.parse(target).getroot().tag.endswith("svg")
    assert [text.get_text() for text in axes.get_legend().texts] == ["base", *toy.COMPARED]


def test_scripts_side_by_side_share_the_cores_and_write_logs(tmp_path, monkeypatch):
    """What a real process sees; the script fails, and its reason is in the log."""
    script = tmp_path / "show.py"
    script.write_text(
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r})\n"
        "os.cpu_count = lambda: 12\n"
        "import torch; from data import BadInput; from flags import run_main\n"
        "def main(): raise BadInput(f'{torch.get_num_threads()} threads')\n"
        "run_main(main)\n"
    )
    monkeypatch.setattr(toy, "__file__", str(tmp_path / "toy.py"))
    with pytest.raises(BadInput, match="show.py failed, as .*log says$"):
        toy.run_script("show.py", "", str(tmp_path / "log"), 4)
    assert (tmp_path / "log").read_text() == "error: 3 threads\n"


def test_an_unknown_command_is_refused():
    done = command(ROOT, "toy.py", "compete")
    assert done.returncode == 2 and "invalid choice: 'compete'" in done.stderr
