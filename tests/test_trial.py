"""tools.trial: its stages run, end when they should, and write what they measured."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from cli import BadInput
from tools import trial


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(tmp_path):
    output = tmp_path / "trial.jsonl"
    output.write_text("an older trial\n")
    command = [sys.executable, "-m", "tools.trial", "--tiny", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, check=True)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    log = (tmp_path / "trial.jsonl.log").read_text()
    assert [line["stage"] for line in lines if "ended" in line] == list(trial.STAGES)
    assert all(line["ended"] == "exit status 0" for line in lines if "ended" in line), log[-3000:]

    found = {name: {} for name in trial.STAGES}
    for line in lines:
        found[line["stage"]] |= line
    assert found["distribution"]["worst_sigma"] < 5
    assert found["lora"]["kl_at_step_0_is_0"] and found["lora"]["saved"]
    assert "skipped" in found["qlora"] or found["qlora"]["kl_at_step_0_is_0"]
    assert found["lora"]["kl"] > 0 and found["lora"]["grad_norm"] > 0  # of the last step
    assert found["fsdp"]["losses"][3] > 0
    assert found["fsdp"]["differences_after_resuming"] == [0, 0]
    assert found["decode"]["seconds_a_token"] > 0
    errors = [line for line in lines if "logps_max_error" in line]
    assert {line["row"] % 128 for line in errors} == {64, 65, 66, 67}
    assert all(line["logps_max_error"] < 1e-4 for line in errors if "float32" in line["dtype"])
    assert all(0 < line["logps_max_error"] < 0.5 for line in errors if "bfloat16" in line["dtype"])
    assert [line["prompts"] for line in lines if "ratio" in line] == [1, 4]


def test_a_stage_that_hangs_is_stopped_and_the_next_one_runs(tmp_path, monkeypatch):
    """At its time limit, together with the processes that it started."""
    monkeypatch.setattr(trial, "ROOT", tmp_path)
    (tmp_path / "tools").mkdir()
    code = "import subprocess, sys, time\nsubprocess.Popen(['sleep', '987'])\ntime.sleep(987)\n"
    (tmp_path / "tools" / "trial.py").write_text(code)
    config = trial.Config(output=str(tmp_path / "out.jsonl"), folder=str(tmp_path), tiny=True)
    trial.run_stage(config, "card", 2)
    (tmp_path / "tools" / "trial.py").write_text("raise SystemExit(3)")
    trial.run_stage(config, "ratio", 60)
    ended = [json.loads(line)["ended"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ended == ["stopped after 2 s", "exit status 3"]
    assert "987" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_the_stages_fit_into_eight_minutes():
    assert sum(limit for _, limit in trial.STAGES.values()) <= 490 and trial.TOTAL_SECONDS < 480


def test_without_a_gpu_only_the_tiny_trial_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["trial", "--output", str(tmp_path / "out.jsonl")])
    with pytest.raises(BadInput, match="there is no CUDA GPU; --tiny tries the stages"):
        trial.main()
    monkeypatch.setattr("sys.argv", ["trial", "--stage", "cook"])
    with pytest.raises(BadInput, match="--stage cook: unknown, choose from card, agreement"):
        trial.main()
