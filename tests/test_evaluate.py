import json
import shutil
import sys

import pytest
import soundfile
from launch import launch

import evaluate
from data import BadInput, load_examples
from evaluate import predict
from rewards import extract_answer, mmau_match


def run_evaluate(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    evaluate.main()


@pytest.fixture
def flags(folder, tmp_path):
    return ["--model", folder / "model", "--data", folder / "test.jsonl", "--output", tmp_path / "eval", "--max_new_tokens", 4]


def test_predictions_are_the_rows_with_what_the_official_script_reads(folder, tmp_path, monkeypatch, capsys, flags, toy_model):
    run_evaluate(monkeypatch, *flags, "--batch_size", 5)
    rows = json.load(open(tmp_path / "eval" / "predictions.json"))
    examples = load_examples(str(folder / "test.jsonl"))
    texts, _ = predict(*toy_model, examples, "answer", 1, 4, quiet=True)  # one at a time: no padding
    for row, example, text in zip(rows, examples, texts, strict=True):
        answer = extract_answer(text, "answer")
        assert row == example.row | {"completion": text, "model_output": answer, "model_prediction": answer}
    right = sum(mmau_match(row["model_output"], row["answer"], row["choices"]) for row in rows)
    out = capsys.readouterr().out
    assert f"{right} of 12" in out and all(task in out for task in ("sound", "music", "speech"))


def test_a_checkpoint_remembers_its_prompt(folder, tmp_path, monkeypatch, flags, capsys):
    shutil.copytree(folder / "model", tmp_path / "trained")
    (tmp_path / "trained" / "run.json").write_text('{"prompt": "think"}')
    run_evaluate(monkeypatch, *flags, "--limit", 1, "--model", tmp_path / "trained")
    assert "prompt think" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "eval")
    run_evaluate(monkeypatch, *flags, "--limit", 1, "--model", tmp_path / "trained", "--prompt", "plain")
    assert "prompt plain" in capsys.readouterr().out


def test_rows_without_answers_are_predicted_and_not_scored(folder, tmp_path, monkeypatch, flags, capsys):
    rows = [json.loads(line) for line in open(folder / "test.jsonl")]
    for row in rows:
        del row["answer"]
    (tmp_path / "mmau.json").write_text(json.dumps(rows))
    run_evaluate(monkeypatch, *flags, "--data", tmp_path / "mmau.json", "--audio_dir", folder)
    assert "nothing to score" in capsys.readouterr().out
    assert all("model_output" in row for row in json.load(open(tmp_path / "eval" / "predictions.json")))


def test_clips_that_the_model_cannot_hear_whole_are_said(tmp_path, monkeypatch, flags, capsys):
    soundfile.write(tmp_path / "long.wav", [0.1, -0.1] * 40_000, 16_000)
    row = {"audio": "long.wav", "question": "What?", "choices": ["a", "b"], "answer": "a"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    run_evaluate(monkeypatch, *flags, "--data", tmp_path / "one.jsonl")
    assert "1 of 1 clips are longer than the 2 s the model hears" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [12, 11])
def test_two_processes_score_each_row_once(folder, tmp_path, monkeypatch, flags, limit):
    run_evaluate(monkeypatch, *flags, "--limit", limit)
    launch("import evaluate; evaluate.main()", *flags, "--limit", limit, "--output", tmp_path / "two")
    one, two = (json.load(open(tmp_path / name / "predictions.json")) for name in ("eval", "two"))
    assert one == two and len(one) == limit


BAD = {
    "predictions are there": ([], "already there"),
    "no data": (["--data", ""], "--data is missing"),
    "unknown prompt": (["--prompt", "shout"], "plain, answer, think"),
    "negative limit": (["--limit", -1, "--output", "elsewhere"], "--limit must be at least 0"),
    "batch size": (["--batch_size", 0], "--batch_size"),
    "no clips": (["--audio_dir", "nowhere", "--output", "elsewhere"], "no audio file"),
}


@pytest.mark.parametrize("more, says", BAD.values(), ids=BAD)
def test_bad_flags_are_refused(tmp_path, monkeypatch, flags, more, says):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "predictions.json").touch()
    with pytest.raises(BadInput, match=says):
        run_evaluate(monkeypatch, *flags, *more)
