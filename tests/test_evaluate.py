import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
import soundfile
import torch
from conftest import launch, run_script, load_examples
from transformers import GenerationConfig

import evaluate
import prepare_data
from data import BadInput
from evaluate import judge, predict, prepare
from rewards import extract_answer, mmau_match, paired_difference, wilson_interval


def answers_of(model, processor, batch):
    return predict(model, processor, prepare(processor, batch, "answer"), 4)


def run_evaluate(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    evaluate.main()


@pytest.fixture
def flags(folder, tmp_path):
    return [
        "--model",
        folder / "model",
        "--data",
        folder / "test.jsonl",
        "--output",
        tmp_path / "eval",
        "--max_new_tokens",
        4,
    ]


def read(*path):
    return json.load(open("/".join(map(str, path))))


# ---------------------------------------------------------------- answering


def test_predictions_are_the_rows_with_what_the_official_script_reads(
    folder, tmp_path, monkeypatch, capsys, flags, toy_model
):
    run_evaluate(monkeypatch, *flags, "--batch_size", 5)
    rows = read(tmp_path, "eval", "predictions.json")
    examples = load_examples(str(folder / "test.jsonl"))
    alone = [answers_of(*toy_model, [e])[0] for e in examples]  # one at a time: no padding
    for row, example, prediction in zip(rows, examples, alone, strict=True):
        answer = extract_answer(prediction.completion, "answer")
        assert row == example.row | {
            "completion": prediction.completion,
            "model_output": answer,
            "model_prediction": answer,
        }
    right = sum(mmau_match(row["model_output"], row["answer"], row["choices"]) for row in rows)
    out = capsys.readouterr().out
    assert f"{right} of 12" in out and all(f"  {task} " in out for task in ("sound", "music", "speech"))


def test_results_say_what_was_measured_and_how(folder, tmp_path, monkeypatch, flags):
    run_evaluate(monkeypatch, *flags)
    results = read(tmp_path, "eval", "results.json")
    assert results["total"] == 12 and results["accuracy"] == results["correct"] / 12
    assert results["interval"] == list(wilson_interval(results["correct"], 12))
    assert results["unparseable"] == 1  # a model that has learned nothing
    assert (results["over_length"], results["unreadable"], results["missing"], results["unanswered"]) == (
        0,
        [],
        0,
        0,
    )
    assert results["data_sha256"] == hashlib.sha256((folder / "test.jsonl").read_bytes()).hexdigest()
    assert (results["model"], results["prompt"], results["decoding"]) == (
        str(folder / "model"),
        "answer",
        "greedy",
    )
    assert results["versions"]["torch"] == torch.__version__ and results["seconds"] > 0
    assert {name: part["total"] for name, part in results["by"]["task"].items()} == {
        "music": 4,
        "sound": 4,
        "speech": 4,
    }
    assert sum(part["correct"] for part in results["by"]["task"].values()) == results["correct"]


def test_a_checkpoint_remembers_its_prompt(folder, tmp_path, monkeypatch, flags):
    shutil.copytree(folder / "model", tmp_path / "trained")
    (tmp_path / "trained" / "run.json").write_text('{"prompt": "think"}')
    run_evaluate(monkeypatch, *flags, "--limit", 1, "--model", tmp_path / "trained")
    assert read(tmp_path, "eval", "results.json")["prompt"] == "think"
    run_evaluate(
        monkeypatch,
        *flags,
        "--limit",
        1,
        "--model",
        tmp_path / "trained",
        "--prompt",
        "plain",
        "--output",
        tmp_path / "two",
    )
    assert read(tmp_path, "two", "results.json")["prompt"] == "plain"


def test_rows_without_answers_are_predicted_and_not_scored(folder, tmp_path, monkeypatch, flags, capsys):
    rows = [json.loads(line) for line in open(folder / "test.jsonl")]
    for row in rows:
        del row["answer"]
    (tmp_path / "mmau.json").write_text(json.dumps(rows))
    run_evaluate(monkeypatch, *flags, "--data", tmp_path / "mmau.json", "--audio_dir", folder)
    assert "nothing to score" in capsys.readouterr().out
    predictions = read(tmp_path, "eval", "predictions.json")
    assert [row | {"model_output": p["model_output"]} for row, p in zip(rows, predictions)] == [
        {key: value for key, value in p.items() if key not in ("model_prediction", "completion")}
        for p in predictions
    ]
    results = read(tmp_path, "eval", "results.json")
    assert (results["accuracy"], results["total"], results["interval"], results["unanswered"]) == (
        None,
        0,
        None,
        12,
    )


def test_one_bad_clip_costs_one_row(folder, tmp_path, monkeypatch, flags, capsys):
    run_evaluate(monkeypatch, *flags)
    rows = [json.loads(line) for line in open(folder / "test.jsonl")]
    shutil.copytree(folder / "test", tmp_path / "test")
    (tmp_path / "test" / "0003.wav").write_text("not a sound")
    (tmp_path / "test" / "0007.wav").unlink()
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_evaluate(monkeypatch, *flags, "--data", tmp_path / "test.jsonl", "--output", tmp_path / "bad")
    whole, bad = (read(tmp_path, name, "predictions.json") for name in ("eval", "bad"))
    for i, (a, b) in enumerate(zip(whole, bad, strict=True)):
        assert b["completion"] == b["model_output"] == "" if i in (3, 7) else a == b
    results = read(tmp_path, "bad", "results.json")
    assert results["total"] == 12 and len(results["unreadable"]) == 2
    for n, (line, name) in enumerate([(4, "0003.wav"), (8, "0007.wav")]):
        assert f"test.jsonl:{line}: " in results["unreadable"][n] and name in results["unreadable"][n]
    assert "2 rows or clips could not be read" in (out := capsys.readouterr().out) and "0007.wav" in out


def test_clips_that_the_model_cannot_hear_whole_are_said(tmp_path, monkeypatch, flags, capsys):
    soundfile.write(tmp_path / "long.wav", [0.1, -0.1] * 40_000, 16_000)
    row = {"audio": "long.wav", "question": "What?", "choices": ["a", "b"], "answer": "a"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    run_evaluate(monkeypatch, *flags, "--data", tmp_path / "one.jsonl")
    assert "1 clips are longer than the model's window" in capsys.readouterr().out
    assert read(tmp_path, "eval", "results.json")["over_length"] == 1


def test_silence_answers_without_hearing(folder, tmp_path, monkeypatch, flags):
    """The same row about two clips of one length: told apart by ear, and not in silence."""
    rows = []
    for i in range(6):
        wave, _ = soundfile.read(folder / "test" / f"{i:04d}.wav")
        soundfile.write(tmp_path / f"{i}.wav", np.resize(wave, 20_000), 16_000)
        rows.append({"audio": f"{i}.wav", "question": "What?", "choices": ["a", "b"], "answer": "a"})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags += ["--data", tmp_path / "rows.json"]
    run_evaluate(monkeypatch, *flags)
    run_evaluate(monkeypatch, *flags, "--silence", "--output", tmp_path / "silent")
    heard, silent = (
        {row["completion"] for row in read(tmp_path, name, "predictions.json")} for name in ("eval", "silent")
    )
    assert len(silent) == 1 < len(heard)
    assert read(tmp_path, "silent", "results.json")["silence"] is True


def test_decoding_by_the_models_own_generation_config(folder, tmp_path, monkeypatch, flags):
    """A config that says greedy gives what our sampler gives; the toy's own says to sample, by the seed."""
    run_evaluate(monkeypatch, *flags)
    shutil.copytree(folder / "model", tmp_path / "greedy")
    config = GenerationConfig.from_pretrained(folder / "model")
    GenerationConfig(do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=3).save_pretrained(
        tmp_path / "greedy"
    )
    run_evaluate(
        monkeypatch,
        *flags,
        "--decoding",
        "model",
        "--model",
        tmp_path / "greedy",
        "--output",
        tmp_path / "own",
    )
    assert read(tmp_path, "eval", "predictions.json") == read(tmp_path, "own", "predictions.json")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_evaluate(monkeypatch, *flags, "--decoding", "model", "--seed", seed, "--output", tmp_path / name)
    a, b, c = (read(tmp_path, name, "predictions.json") for name in "abc")
    assert a == b != c and a != read(tmp_path, "eval", "predictions.json")


@pytest.mark.slow
@pytest.mark.parametrize("limit, fsdp", [(12, False), (11, False), (11, True)])
def test_two_processes_score_each_row_once(folder, tmp_path, monkeypatch, flags, limit, fsdp):
    run_evaluate(monkeypatch, *flags, "--limit", limit)
    launch(
        "import evaluate; evaluate.main()", *flags, "--limit", limit, "--output", tmp_path / "two", fsdp=fsdp
    )
    one, two = (read(tmp_path, name, "predictions.json") for name in ("eval", "two"))
    assert one == two and len(one) == limit
    one, two = (read(tmp_path, name, "results.json") for name in ("eval", "two"))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert {k: v for k, v in one.items() if k != "seconds"} == {
        k: v for k, v in two.items() if k != "seconds"
    }


def test_one_question_about_ones_own_clip(folder, monkeypatch, capsys, toy_model):
    example = load_examples(str(folder / "test.jsonl"))[0]
    asked = ["--ask", example.audio, "--question", example.question, "--choices", *example.choices]
    run_evaluate(monkeypatch, "--model", folder / "model", "--max_new_tokens", 4, *asked)
    (prediction,) = answers_of(*toy_model, [example])
    assert capsys.readouterr().out == prediction.completion + "\n"
    monkeypatch.chdir(folder / "test")  # where the same name stands for another clip
    asked[1] = "elsewhere/0000.wav"
    with pytest.raises(BadInput, match="elsewhere/0000.wav: no such audio file"):
        run_evaluate(monkeypatch, "--model", folder / "model", *asked)


# ---------------------------------------------------------------- scoring


def official(prediction, answer, choices):
    """The rule of the design, word by word, with no set and no regular expression."""

    def words(text):
        groups = groupby(text.lower(), lambda letter: letter.isalnum() or letter == "_")
        return ["".join(group) for is_word, group in groups if is_word]

    said, true = words(prediction), words(answer)
    for word in true:
        if word not in said:
            return False
    for choice in choices:
        if sorted(set(words(choice))) != sorted(set(true)):
            for word in words(choice):
                if word in said and word not in true:
                    return False
    return len(said) > 0


WORDS = [
    "dog",
    "Dog",
    "cat",
    "a",
    "barking",
    "2",
    "2.5",
    "é",
    "naïve",
    "犬",
    "x_y",
    "O'Neil",
    "well-known",
    "ß",
    "İ",
    "?",
    "",
    "𝟜",
]


def mmau_rows(n, seed):
    """Rows as MMAU's, with predictions of every kind."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        choices = [" ".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(rng.randint(2, 8))]
        choices += rng.choices(choices, k=rng.randint(0, 1))  # some stand twice
        answer = rng.choice(choices) or "dog"
        other = rng.choice(choices)
        said = rng.choice(
            [
                answer,
                answer.upper(),
                f"The answer is {answer}.",
                f"({answer})!",
                f"{answer} or {other}",
                other,
                "",
                " ",
                "?!",
                answer[::-1],
                " ".join(rng.choices(WORDS, k=4)),
                "".join(chr(rng.randint(32, 0x2FFF)) for _ in range(8)),
            ]
        )
        row = {
            "id": str(i),
            "choices": choices,
            "answer": answer,
            "task": rng.choice(["sound", "music", "speech"]),
        }
        row |= {
            "difficulty": rng.choice(["easy", "hard"]),
            "sub-category": f"sub {rng.randint(0, 5)}",
            "category": ["a", "b"],
        }
        rows.append(row | {rng.choice(["model_output", "model_prediction"]): said})
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_the_benchmarks_in_every_group(tmp_path, monkeypatch, seed):
    rows = mmau_rows(2000, seed)
    (tmp_path / "predictions.json").write_text(json.dumps(rows))
    run_evaluate(monkeypatch, "--score", tmp_path / "predictions.json")
    results, right, total = read(tmp_path, "results.json"), Counter(), Counter()
    for row in rows:
        said = row["model_output"] if "model_output" in row else row["model_prediction"]
        correct = official(said, row["answer"], row["choices"])
        for group in ("all", *((key, row[key]) for key in ("task", "difficulty", "sub-category"))):
            right[group] += correct
            total[group] += 1
    assert (results["correct"], results["total"]) == (right["all"], 2000) and 200 < right["all"] < 1800
    for key in ("task", "difficulty", "sub-category"):
        found = {(key, name): (part["correct"], part["total"]) for name, part in results["by"][key].items()}
        assert found == {group: (right[group], total[group]) for group in total if group[0] == key}


ROW = {"choices": ["dog", "cat"], "answer": "dog"}


@pytest.mark.parametrize(
    "row, right",
    [
        (ROW | {"model_output": "dog"}, True),
        (ROW | {"model_prediction": "dog"}, True),
        (ROW | {"model_output": None, "model_prediction": "dog"}, True),
        (ROW | {"model_output": None}, False),
        (ROW, False),
        (ROW | {"model_output": ""}, False),
        ({"choices": ["dog", "cat"], "model_output": "dog"}, None),
        (ROW | {"answer": "", "model_output": "dog"}, None),
        ({"choices": [2, 3], "answer": 2, "model_output": 2}, True),
        (
            ROW | {"answer": "a hound", "model_output": "a hound"},
            True,
        ),  # not among the options: the rule does not ask
        ({"multi_choice": ["dog", "cat"], "answer": 1, "model_output": "cat"}, True),  # AVQA
        (ROW | {"model_output": " ", "model_prediction": "dog"}, True),
        (ROW | {"model_output": float("nan"), "model_prediction": "dog"}, True),
        ({"answer": "dog", "choices": None, "model_output": "dog", "unusable": "no options"}, False),
        ({"model_output": "dog", "unusable": "not an object"}, False),
        ({"multi_choice": ["dog", "cat"], "choices": ["a", "b"], "answer": 1, "model_output": "cat"}, True),
    ],
)
def test_odd_rows_are_judged(row, right):
    assert judge(row, "") is right


def test_rows_without_a_prediction_are_wrong_and_counted(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps(row) for row in (ROW, ROW | {"model_output": "dog"}, ROW))
    )
    run_evaluate(monkeypatch, "--score", tmp_path / "p.jsonl")
    results = read(tmp_path, "p.results.json")
    assert (results["correct"], results["total"], results["missing"]) == (1, 3, 2)
    assert "2 rows have no prediction" in capsys.readouterr().out


@pytest.mark.parametrize("answer, odd", [("B", 1), (1, 1), ("B. cat", 0), ("b cat", 0), ("cat", 1)])
def test_answers_that_are_no_option_are_counted(tmp_path, monkeypatch, capsys, answer, odd):
    """A letter or an index: by the rule hardly any prediction is right then."""
    rows = [{"choices": ["A. dog", "B. cat"], "answer": answer, "model_output": "B. cat"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    run_evaluate(monkeypatch, "--score", tmp_path / "p.json")
    results = read(tmp_path, "p.results.json")
    assert (results["odd_answers"], results["correct"]) == (odd, 1 - odd)
    assert ("1 rows have an answer that is none of their options" in capsys.readouterr().out) == bool(odd)


def test_predictions_for_rows_that_cannot_be_used_can_be_scored_again(folder, tmp_path, monkeypatch, flags):
    rows = [json.loads(line) for line in open(folder / "test.jsonl")]
    rows[2]["choices"], rows[3], rows[4] = [], 5, 6
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run_evaluate(monkeypatch, *flags, "--data", tmp_path / "rows.json", "--audio_dir", folder)
    before = read(tmp_path, "eval", "results.json")
    assert (before["total"], before["unanswered"], len(before["unreadable"])) == (12, 0, 3)
    predictions = tmp_path / "eval" / "predictions.json"
    assert "no list of at least two options" in json.loads(predictions.read_text())[2]["unusable"]
    run_evaluate(monkeypatch, "--score", predictions)
    assert read(tmp_path, "eval", "results.json") == before
    run_evaluate(monkeypatch, "--compare", predictions, predictions)
    files = dict(predictions=str(predictions), output=str(tmp_path / "wrong.jsonl"))
    prepare_data.filter(str(tmp_path / "rows.json"), **files)
    wrong = [json.loads(line) for line in open(tmp_path / "wrong.jsonl")]
    assert len(wrong) == 9 - before["correct"] and all(row in rows for row in wrong)


def test_without_answers_a_row_that_cannot_be_read_is_not_scored(
    folder, tmp_path, monkeypatch, flags, capsys
):
    rows = [json.loads(line) | {"answer": ""} for line in open(folder / "test.jsonl")]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, 5]))
    run_evaluate(monkeypatch, *flags, "--data", tmp_path / "rows.json", "--audio_dir", folder)
    assert "nothing to score" in capsys.readouterr().out


def test_clips_found_by_their_file_name_alone_are_said(folder, tmp_path, monkeypatch, flags, capsys):
    """The folder of the training clips, which have the same names."""
    run_evaluate(monkeypatch, *flags, "--audio_dir", folder / "train")
    out = capsys.readouterr().out
    assert "12 clips are not at their path and were found by their file name alone" in out
    assert f"test.jsonl:1, as {folder / 'train' / '0000.wav'}" in out


def test_half_a_character_does_not_lose_the_results(tmp_path):
    """JSON can hold half of a surrogate pair; UTF-8 cannot."""
    evaluate.write_json(str(tmp_path / "p.json"), [{"completion": "half \ud83d, whole 😀"}])
    assert read(tmp_path, "p.json") == [{"completion": "half \ud83d, whole 😀"}]


def test_mmar_is_grouped_by_modality(tmp_path, monkeypatch):
    rows = [ROW | {"modality": m, "model_output": "dog"} for m in ("sound", "mix-sound-speech", "sound")]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    run_evaluate(monkeypatch, "--score", tmp_path / "p.json")
    assert {
        name: part["total"] for name, part in read(tmp_path, "p.results.json")["by"]["modality"].items()
    } == {
        "sound": 2,
        "mix-sound-speech": 1,
    }


def test_scoring_again_keeps_what_the_run_knew(tmp_path, monkeypatch, flags):
    run_evaluate(monkeypatch, *flags)
    before = read(tmp_path, "eval", "results.json")
    run_evaluate(monkeypatch, "--score", tmp_path / "eval" / "predictions.json")
    assert read(tmp_path, "eval", "results.json") == before
    (tmp_path / "eval" / "predictions.json").write_text(json.dumps([ROW | {"model_output": "dog"}]))
    run_evaluate(
        monkeypatch, "--score", tmp_path / "eval" / "predictions.json"
    )  # another file: nothing of the old is true
    after = read(tmp_path, "eval", "results.json")
    assert after["total"] == 1 and "model" not in after and after["unparseable"] is None


# ---------------------------------------------------------------- comparing


def test_two_files_are_compared_row_by_row(tmp_path, monkeypatch, capsys):
    a = [row | {"question": "?"} for row in mmau_rows(300, 0)]
    b = [row | {"question": "?", "model_output": row["answer"]} for row in a]
    for name, rows in (("a", a), ("b", b[::-1])):  # the order does not matter
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    run_evaluate(monkeypatch, "--compare", tmp_path / "a.json", tmp_path / "b.json")
    out = capsys.readouterr().out
    first, second = ([judge(row, "") for row in rows] for rows in (a, b))
    d, low, high, p = paired_difference(list(zip(first, second)))
    overall = next(line for line in out.splitlines() if line.startswith("overall"))
    numbers = [float(number) for number in re.findall(r"[-+]?[\d.]+(?:e-\d+)?", overall)]
    expected = [100 * sum(first) / 300, 100 * sum(second) / 300, 100 * d, 100 * low, 100 * high]
    assert numbers[:5] == pytest.approx(expected, abs=0.051) and numbers[5] == pytest.approx(p, rel=0.05)
    assert numbers[6] == 300 and all(f"  {task} " in out for task in ("sound", "music", "speech"))


# ---------------------------------------------------------------- checkpoints


def test_adapters_are_evaluated_as_they_are(folder, tmp_path, monkeypatch, flags):
    run_script("train_sft", folder, tmp_path / "run", max_steps=4, lora_rank=4, save_every=2, merge=True)
    for name in ("", "merged", "checkpoint-2"):
        run_evaluate(
            monkeypatch, *flags, "--model", tmp_path / "run" / name, "--output", tmp_path / f"eval {name}"
        )
    run_evaluate(monkeypatch, *flags)
    base, adapted, merged, half = (
        read(tmp_path, name, "predictions.json")
        for name in ("eval", "eval ", "eval merged", "eval checkpoint-2")
    )
    assert adapted == merged != base != half
    run_evaluate(monkeypatch, *flags[2:4], "--max_new_tokens", 4, "--checkpoints", tmp_path / "run")
    assert read(tmp_path, "run", "eval", "checkpoint-2", "predictions.json") == half


def test_every_checkpoint_not_yet_done_is_evaluated(folder, tmp_path, monkeypatch, flags, capsys):
    for step in (5, 10, 100):
        shutil.copytree(folder / "model", tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "checkpoint-100" / "config.json").unlink()  # not complete
    flags = [*flags[2:4], "--max_new_tokens", 4, "--checkpoints", tmp_path / "run"]
    run_evaluate(monkeypatch, *flags)
    out = capsys.readouterr().out
    assert re.search(r"\n +5 .* o-+ <- best\n +10 .*\n", out.replace("-o", " o")) and "optimistic" in out
    done = tmp_path / "run" / "eval" / "checkpoint-5" / "results.json"
    assert not (tmp_path / "run" / "eval" / "checkpoint-100").exists()

    written = done.stat().st_mtime_ns
    shutil.copytree(folder / "model", tmp_path / "run" / "checkpoint-15")
    run_evaluate(monkeypatch, *flags)
    assert (
        done.stat().st_mtime_ns == written
        and (tmp_path / "run" / "eval" / "checkpoint-15" / "results.json").exists()
    )
    with pytest.raises(BadInput, match="made with another max_new_tokens; name another --output"):
        run_evaluate(monkeypatch, *flags, "--max_new_tokens", 5)
    os.utime(tmp_path / "run" / "checkpoint-5" / "config.json")  # trained anew
    with pytest.raises(BadInput, match="checkpoint-5: made with another run, which was here before; name"):
        run_evaluate(monkeypatch, *flags)


def test_the_curve_of_one_run_is_not_that_of_another(folder, tmp_path, monkeypatch, flags):
    for name in ("one", "two"):
        shutil.copytree(folder / "model", tmp_path / name / "checkpoint-5")
    flags = [*flags[2:4], "--max_new_tokens", 4, "--output", tmp_path / "curve"]
    run_evaluate(monkeypatch, *flags, "--checkpoints", tmp_path / "one")
    run_evaluate(monkeypatch, *flags, "--checkpoints", tmp_path / "one")
    with pytest.raises(BadInput, match="checkpoint-5: made with another model; name another --output"):
        run_evaluate(monkeypatch, *flags, "--checkpoints", tmp_path / "two")


# ---------------------------------------------------------------- bad input


BAD = {
    "predictions are there": ([], "already there"),
    "no data": (["--data", ""], "--data is missing"),
    "unknown prompt": (["--prompt", "shout", "--output", "elsewhere"], "plain, answer, think"),
    "unknown decoding": (["--decoding", "beam"], "greedy or model"),
    "negative limit": (["--limit", -1], "--limit must be at least 0"),
    "batch size": (["--batch_size", 0], "--batch_size"),
    "no clips": (["--audio_dir", "nowhere"], "no audio file .*12 of 12 clips are missing"),
    "no such folder of checkpoints": (
        ["--checkpoints", "nowhere"],
        "nowhere: holds no complete checkpoint-N",
    ),
    "two things": (["--score", "a", "--ask", "b"], "--score and --ask are two things to do"),
    "no file to score": (["--score", "nowhere"], "nowhere: cannot be read"),
    "one file to compare": (["--compare", "a"], "takes two files"),
    "nothing to ask": (["--ask", "a.wav"], "--ask: no question"),
    "nothing to choose from": (
        ["--ask", "a.wav", "--question", "b", "--choices", "c"],
        "--ask: no list of at least two options",
    ),
    "no clip to ask about": (
        ["--ask", "a.wav", "--question", "b", "--choices", "c", "d"],
        "a.wav: no such audio file",
    ),
}


@pytest.mark.parametrize("more, says", BAD.values(), ids=BAD)
def test_bad_flags_are_refused(tmp_path, monkeypatch, flags, more, says):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "predictions.json").touch()
    with pytest.raises(BadInput, match=says):
        run_evaluate(monkeypatch, *flags, *more)


BAD_PREDICTIONS = {
    "no predictions": ([ROW], "no row has a prediction"),
    "no rows": ([], "holds no rows"),
    "no options": ([{"answer": "a", "model_output": "a"}], "p.json: row 1: no list of options"),
    "not an object": ([ROW | {"model_output": "a"}, 3], "p.json: row 2: not a JSON object"),
    "index is a float": (
        [{"multi_choice": ["a", "b"], "answer": 1.0, "model_output": "a"}],
        "index from 0 to 1, not 1.0",
    ),
    "index": ([{"multi_choice": ["a", "b"], "answer": 2, "model_output": "a"}], "index from 0 to 1, not 2"),
}


@pytest.mark.parametrize("rows, says", BAD_PREDICTIONS.values(), ids=BAD_PREDICTIONS)
def test_predictions_that_cannot_be_scored_are_refused(tmp_path, monkeypatch, rows, says):
    (tmp_path / "p.json").write_text(json.dumps(rows))
    with pytest.raises(BadInput, match=says):
        run_evaluate(monkeypatch, "--score", tmp_path / "p.json")
    assert not (tmp_path / "results.json").exists()


def test_files_that_cannot_be_compared_are_refused(tmp_path, monkeypatch):
    rows = [row | {"model_output": "dog"} for row in mmau_rows(3, 0)]
    bare = [{key: value for key, value in row.items() if key != "answer"} for row in rows]
    for name, part in {"a": rows, "fewer": rows[:2], "twice": rows + rows[:1], "bare": bare}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    for other, says in {
        "fewer": "hold different questions: 1 are only in the first, 0 in the second",
        "twice": "twice.json: row 4: the same question as in a row before it",
    }.items():
        with pytest.raises(BadInput, match=says):
            run_evaluate(monkeypatch, "--compare", tmp_path / "a.json", tmp_path / f"{other}.json")
    with pytest.raises(BadInput, match="no answers to compare with"):
        run_evaluate(monkeypatch, "--compare", tmp_path / "bare.json", tmp_path / "bare.json")


def test_processes_wait_for_each_other_for_hours(monkeypatch, flags):
    handlers = []

    def stop(kwargs_handlers):
        handlers.extend(kwargs_handlers)
        raise BadInput("enough")

    monkeypatch.setattr(evaluate, "Accelerator", stop)
    with pytest.raises(BadInput, match="enough"):
        run_evaluate(monkeypatch, *flags)
    assert handlers[0].timeout.total_seconds() >= 7200


def test_features_are_fp32_and_made_ahead(folder, monkeypatch, flags, toy_model):
    """In a thread, whose autocast is its own; the next batch before the one at work is answered."""
    order, plain_prepare, plain_predict = [], evaluate.prepare, evaluate.predict

    def prepare(*args):
        order.append("prepare")
        asked = plain_prepare(*args)
        assert asked.inputs["input_features"].dtype == torch.float32
        return asked

    def predict(*args):
        while order.count("prepare") < min(12 // 4, order.count("predict") + 2):
            time.sleep(0.01)
        order.append("predict")
        return plain_predict(*args)

    monkeypatch.setattr(evaluate, "prepare", prepare)
    monkeypatch.setattr(evaluate, "predict", predict)
    with torch.autocast("cpu", torch.bfloat16):
        run_evaluate(monkeypatch, *flags, "--batch_size", 4)
    assert order.count("predict") == 3
