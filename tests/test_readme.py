"""What the documents say is so: their links, commands, flags, and changes to the code."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, launch, metrics, training_code
from transformers import HfArgumentParser

import evaluate
import toy
import train_grpo
import train_sft

FILES = ["README.md", "docs/REFERENCE.md", "docs/changes.md", "CONTRIBUTING.md"]
TEXTS = {file: (ROOT / file).read_text() for file in FILES}
README = TEXTS["README.md"]
DOCS = "\n".join(TEXTS.values())
SCRIPTS = {"train_grpo.py": train_grpo, "train_sft.py": train_sft, "evaluate.py": evaluate}
# "**title** ...", then a diff
PATTERN = r"\n\*\*([^*\n]+)\*\*(?:(?!\n\*\*).)*?```diff\n(.*?)```"
CHANGES = dict(re.findall(PATTERN, DOCS, re.DOTALL))


def test_links_lead_to_the_file_of_the_function():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README)
    assert len(links) >= 7
    for name, file in links:
        assert f"\ndef {name}(" in (ROOT / file).read_text(), (name, file)


def test_links_lead_somewhere():
    for file, text in TEXTS.items():
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            path = (ROOT / file).parent / target if target else ROOT / file
            assert path.exists(), (file, target)
            if heading:
                lines = path.read_text().splitlines()
                titles = [line.lstrip("# ").lower() for line in lines if line.startswith("#")]
                anchors = [re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles]
                assert heading in anchors, (file, target, heading)


def test_commands_name_flags_that_exist():
    lines = DOCS.replace("\\\n", " ").splitlines()
    commands = [
        line
        for line in lines
        if re.match(r"    (accelerate|python) .*(train_grpo|train_sft|evaluate)\.py", line)
    ]
    commands += re.findall(r"`\$L ((?:train_grpo|train_sft|evaluate)\.py .*?)`", DOCS)
    assert len(commands) > 10
    for command in commands:
        script, flags = re.search(r"(\w+\.py)(.*)", command).groups()
        words = [word for word in shlex.split(flags, comments=True) if word not in ("...", "…")]
        _, unknown = HfArgumentParser(SCRIPTS[script].Config).parse_args_into_dataclasses(
            words, return_remaining_strings=True
        )
        assert not unknown, command


def test_the_question_asked_is_the_one_about_that_clip(tmp_path):
    toy.make_data(tmp_path, "test", 1, seed=2)
    row = json.loads((tmp_path / "test.jsonl").read_text())
    question, choices = re.search(
        r'--ask runs/toy/test/0000.wav \\\n +--question "(.*?)" --choices (.*)', README
    ).groups()
    assert question in toy.KINDS[row["kind"]][1] and choices.split() == row["choices"]


def test_every_flag_of_the_tables_exists():
    fields = set().union(*(script.Config.__dataclass_fields__ for script in SCRIPTS.values()))
    named = set(re.findall(r"`--(\w+)", DOCS))
    of_tools = {"json", "size", "decode", "drop", "limit"}
    of_accelerate = {"help", "mixed_precision", "multi_gpu", "machine_rank"}
    assert named - of_tools - of_accelerate <= fields


# ---------------------------------------------------------------- change it


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The metrics of a short run of the repository with a change applied."""
    rows = [
        json.loads(line) | {"completion": "odd" if i % 2 else "even"}
        for i, line in enumerate(open(folder / "train.jsonl"))
    ]
    (folder / "predictions.json").write_text(json.dumps(rows))

    def run_changed(diff: str, *flags: str, two_processes: bool = False) -> list[dict]:
        copy = tmp_path_factory.mktemp("fork")
        for script in ROOT.glob("*.py"):
            shutil.copy(script, copy)
        if diff:
            subprocess.run(["git", "apply"], input=diff, text=True, cwd=copy, check=True)
        settings = f"--model {folder}/model --data {folder}/predictions.json --output {copy}/run"
        settings += " --prompts_per_step 4 --micro_batch 2"
        settings += " --group_size 4 --max_steps 2 --max_new_tokens 30 --lr 1e-3 --num_iterations 2"
        if two_processes:
            launch(training_code("train_grpo"), *settings.split(), *flags, root=copy)
            return metrics(copy / "run")
        done = subprocess.run(
            [sys.executable, "-c", training_code("train_grpo"), *settings.split(), *flags],
            cwd=copy,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return metrics(copy / "run")

    return run_changed


@pytest.fixture(scope="module")
def unchanged(run):
    return run("")


def test_there_are_six_short_changes():
    titles = ["Another reward", "Dr. GRPO", "DAPO", "No KL", "Only the hard questions", "Another prompt"]
    assert list(CHANGES) == titles
    for title, diff in CHANGES.items():
        changed = re.findall(r"^[+-](?!\+\+|--)", diff, re.MULTILINE)
        assert len(changed) <= 8, title


@pytest.mark.parametrize("title", CHANGES)
def test_changes_apply_as_they_stand(tmp_path, title):
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    subprocess.run(["git", "apply", "--verbose"], input=CHANGES[title], text=True, cwd=tmp_path, check=True)


@pytest.mark.slow
def test_another_reward(run, unchanged):
    for line in run(CHANGES["Another reward"]):
        assert 1 < 10 * line["reward_length"] / line["completion_tokens"] < 10
        parts = line["reward_accuracy"] + line["reward_format"] + line["reward_length"]
        assert line["reward"] == pytest.approx(parts, rel=1e-5)
    assert "reward_length" not in unchanged[0]


@pytest.mark.slow
def test_dr_grpo(run, unchanged):
    """Deviations are below 1, and the constant far exceeds the length: a smaller gradient, same samples."""
    (first, *_), (plain, *_) = run(CHANGES["Dr. GRPO"]), unchanged
    assert first["reward"] == plain["reward"] and 0 < first["grad_norm"] < 0.3 * plain["grad_norm"]


@pytest.mark.slow
def test_dapo(run, unchanged):
    (first, *_), (plain, *_) = run(CHANGES["DAPO"], "--micro_batch", "1"), unchanged
    assert first["reward"] == plain["reward"] and first["clip_fraction"] < plain["clip_fraction"]
    # the mean is over all tokens of the step, however they are split
    (together, *_) = run(CHANGES["DAPO"], "--micro_batch", "4")
    assert together["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3) != plain["grad_norm"]


@pytest.mark.slow
def test_dapo_on_two_processes(run):
    """Counts must not be averaged over processes as integers."""
    run(CHANGES["DAPO"], "--micro_batch", "2", two_processes=True)


@pytest.mark.slow
def test_no_kl(run, unchanged):
    lines = run(CHANGES["No KL"])
    assert [line["kl"] for line in lines] == [0, 0] and unchanged[-1]["kl"] > 0


@pytest.mark.slow
def test_only_the_hard_questions(run, unchanged):
    """In this test a completion of odd length is right; half of the rows have one."""
    lines = run(CHANGES["Only the hard questions"])
    assert lines[0]["reward"] != unchanged[0]["reward"]


@pytest.mark.slow
def test_another_prompt(run, unchanged):
    lines = run(CHANGES["Another prompt"], "--prompt", "listen")
    assert lines[0]["reward"] != unchanged[0]["reward"]
    with pytest.raises(AssertionError, match="--prompt listen: unknown"):
        run("", "--prompt", "listen")
