"""What the docs say is true: their links, commands, flags, and changes to the code."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, launch, metrics, training_code, write
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
    of_tools = {"growth", "json", "size", "decode", "drop", "limit", "table", "tiny"}
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

    def run_changed(diff: str, *flags: str, two_processes=False, reward_odd_lengths=True) -> list[dict]:
        copy = tmp_path_factory.mktemp("fork")
        for script in ROOT.glob("*.py"):
            shutil.copy(script, copy)
        if diff:
            subprocess.run(["git", "apply"], input=diff, text=True, cwd=copy, check=True)
        settings = f"--model {folder}/model --data {folder}/predictions.json --output {copy}/run"
        settings += " --prompts_per_step 4 --micro_batch 2"
        settings += " --group_size 4 --max_steps 2 --max_new_tokens 30 --lr 1e-3 --num_iterations 2"
        words = [*settings.split(), *flags]
        if two_processes:
            launch(training_code("train_grpo"), *words, root=copy)
            return metrics(copy / "run")
        code = training_code("train_grpo") if reward_odd_lengths else ""
        code = ["-c", code] if code else ["train_grpo.py"]
        done = subprocess.run([sys.executable, *code, *words], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return metrics(copy / "run")

    return run_changed


@pytest.fixture(scope="module")
def unchanged(run):
    return run("")


def test_there_are_ten_short_changes():
    assert list(CHANGES)[:2] == ["Another reward", "Dr. GRPO"] and len(CHANGES) == 10
    for title, diff in CHANGES.items():
        assert len(re.findall(r"^[+](?![+][+])", diff, re.MULTILINE)) <= 18, title


@pytest.mark.parametrize("title", CHANGES)
def test_changes_apply_as_they_stand(tmp_path, title):
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    subprocess.run(["git", "apply", "--verbose"], input=CHANGES[title], text=True, cwd=tmp_path, check=True)


# what a change should compute, written out plainly; CASE runs it on random inputs
PLAIN = {
    "Dr. GRPO": """
        assert torch.allclose(group_advantages(r), torch.stack([group - group.mean() for group in r]))
        tokens = [token_loss(i, t) for i in range(G) for t in range(lengths[i])]
        expected = sum(tokens) / 256 / G
    """,
    "DAPO": """
        high = 1.28
        tokens = [token_loss(i, t, high) for i in range(G) for t in range(lengths[i])]
        expected = sum(tokens) / len(tokens)
    """,
    "GSPO": """
        expected = 0
        for i in range(G):
            n = lengths[i]
            ratio = ((logps[0, i, :n] - old[0, i, :n]).sum() / n).exp()
            best = min(ratio * A[i], ratio.clamp(0.8, 1.2) * A[i])
            expected -= (best - 0.04 * sum(kl(i, t) for t in range(n)) / n) / G
    """,
    "RLOO": """
        for group, advantages in zip(r, group_advantages(r)):
            for i in range(G):
                others = [group[k] for k in range(G) if k != i]
                assert torch.isclose(advantages[i], group[i] - sum(others) / len(others), atol=1e-6)
        expected = sum(token_loss(i, t) / lengths[i] for i in range(G) for t in range(lengths[i])) / G
    """,
}
CASE = """
import torch
from train_grpo import group_advantages, grpo_loss

for seed in range(50):
    torch.manual_seed(seed)
    G, T = 4, 6
    lengths = torch.randint(1, T + 1, (G,)).tolist()
    lengths[0] = T
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None])[None]
    logps, old, ref = (torch.randn(1, G, T) * 0.3 - 2 for _ in range(3))
    logps.requires_grad_()
    A, r = torch.randn(G), torch.rand(3, G)

    def kl(i, t):
        d = ref[0, i, t] - logps[0, i, t]
        return d.exp() - d - 1

    def token_loss(i, t, high=1.2):
        ratio = (logps[0, i, t] - old[0, i, t]).exp()
        return -(min(ratio * A[i], ratio.clamp(0.8, high) * A[i]) - 0.04 * kl(i, t))
BODY
    loss, values = grpo_loss(logps, old, ref, A[None], mask, epsilon=0.2, beta=0.04)
    assert torch.isclose(loss, expected, atol=1e-6), (seed, loss, expected)
    grads = [torch.autograd.grad(x, logps, retain_graph=True)[0] for x in (loss, expected)]
    assert torch.allclose(*grads, atol=1e-6), seed
    mean_kl = sum(kl(i, t) for i in range(G) for t in range(lengths[i])) / sum(lengths)
    assert torch.isclose(values["kl"][mask].mean(), mean_kl, atol=1e-6)
"""


@pytest.mark.parametrize("title", PLAIN)
def test_a_change_computes_what_its_paper_says(tmp_path, title):
    """Loss, gradient and the KL metric against a plain computation, token by token."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    subprocess.run(["git", "apply"], input=CHANGES[title], text=True, cwd=tmp_path, check=True)
    body = textwrap.indent(textwrap.dedent(PLAIN[title]), "    ")
    code = [sys.executable, "-c", CASE.replace("BODY", body)]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_another_reward(run, unchanged):
    for line in run(CHANGES["Another reward"]):
        assert 1 < 10 * line["reward_length"] / line["completion_tokens"] < 10
        parts = line["reward_accuracy"] + line["reward_format"] + line["reward_length"]
        assert line["reward"] == pytest.approx(parts, rel=1e-5)
    assert "reward_length" not in unchanged[0]


SPLITS = {"micro-batches of 1": ("1", False), "of 4": ("4", False), "two processes": ("2", True)}


@pytest.mark.slow
@pytest.mark.parametrize("title", ["Dr. GRPO", "DAPO", "GSPO"])
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_split(run, unchanged, title):
    lines = []
    for micro_batch, two_processes in SPLITS.values():
        lines.append(run(CHANGES[title], "--micro_batch", micro_batch, two_processes=two_processes)[0])
    for name in ("loss", "grad_norm", "kl", "entropy", "clip_fraction_low", "clip_fraction_high"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-3, abs=1e-6), name
        assert lines[0][name] == pytest.approx(lines[2][name], rel=1e-3, abs=1e-6), name
    assert lines[0]["grad_norm"] != pytest.approx(unchanged[0]["grad_norm"], rel=1e-3)
    # the samples do not depend on the loss before the first update; only DAPO draws again
    if title != "DAPO":
        assert lines[0]["reward"] == unchanged[0]["reward"]


@pytest.mark.slow
def test_dapo_draws_again_and_punishes_length(run, unchanged):
    (first, *_) = run(CHANGES["DAPO"], "--max_new_tokens", "12")
    assert -1 <= first["reward_overlong"] < 0
    assert first["reward_accuracy"] != unchanged[0]["reward_accuracy"]


@pytest.mark.slow
def test_an_entropy_bonus_keeps_entropy_up(run):
    """With a weight so large that it outweighs everything else."""
    strong = CHANGES["An entropy bonus"].replace("0.01 *", "100 *")
    flags = ("--max_steps", "6", "--num_iterations", "1")
    assert run(strong, *flags)[-1]["entropy"] > run("", *flags)[-1]["entropy"] + 0.01


class Judge(BaseHTTPRequestHandler):
    """Scores each completion with a tenth of its length, for the first `answers` requests."""

    answers = 99

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Judge.answers -= 1
        if Judge.answers < 0:
            return self.send_error(500)
        assert all(row.keys() == {"question", "answer", "text"} for row in asked) and len(asked) % 4 == 0
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([len(row["text"]) / 10 for row in asked]).encode())

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_a_judge_over_http(run):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    diff = CHANGES["A judge over HTTP"].replace("8008", str(server.server_port))
    for line in run(diff):
        assert 0.1 < line["reward_judge"] / line["completion_tokens"] < 1
    Judge.answers = 2  # the groups of samples.jsonl, and one step
    with pytest.raises(AssertionError, match="error: HTTP Error 500") as failed:
        run(diff)
    assert "stopped after 1 of 2 steps" in str(failed.value) and "Traceback" not in str(failed.value)
    server.shutdown()
    server.server_close()
    Judge.answers = 99
    with pytest.raises(AssertionError, match="error: .*Connection refused"):
        run(diff)


@pytest.mark.slow
def test_free_form_answers(run, folder, tmp_path):
    rows = [json.loads(line) for line in open(folder / "train.jsonl")]
    for row in rows:
        row["audio"] = str(folder / row["audio"])
        del row["choices"]
    path = write(tmp_path / "free.jsonl", rows)
    flags = ("--data", path, "--eval_data", path, "--max_steps", "2")
    lines = run(CHANGES["Free-form answers"], *flags, reward_odd_lengths=False)
    rewards = [line["reward_accuracy"] for line in lines if "reward" in line]
    accuracies = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
    assert all(0 < value < 0.5 for value in rewards + accuracies) and len(accuracies) == 2


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
