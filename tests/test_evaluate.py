"""What evaluate.py answers, counts, prints and refuses. Rows it cannot read are in test_bad_input.py."""

import hashlib
import json
import os
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import soundfile
import torch
from conftest import OWN, launch, load_examples, run_script, write
from transformers import GenerationConfig

from cli import BadInput
from data import read_rows
from evaluate import RELEASES, answer, read_questions, show_curve, with_other_clips
from evaluate import with_rotated_options
from model import encode_audio
from rewards import extract_answer, judge, mmau_match, paired_difference, tally, wilson_interval


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def flags(folder):
    return ["--model", folder / "model", "--data", folder / "test.jsonl", "--max_new_tokens", 4]


@pytest.fixture
def evaluation(tmp_path, flags, run_evaluate):
    """Evaluate the toy on its 12 test questions; returns the predictions and the results."""

    def run(*more, output="eval"):
        run_evaluate(*flags, "--output", tmp_path / output, *more)
        return read(tmp_path / output / "predictions.json"), read(tmp_path / output / "results.json")

    return run


# ---------------------------------------------------------------- answering


def answer_alone(toy_model, example):
    """The completion of one example: a batch of one has no padding."""
    model, processor = toy_model
    (prediction,) = answer(model, processor, read_questions(processor, [example], "answer"), 4)
    return prediction.completion


def test_predictions_are_the_rows_with_the_keys_of_the_benchmarks_script(folder, evaluation, toy_model):
    rows, _ = evaluation("--batch_size", 5)
    examples = load_examples(str(folder / "test.jsonl"))
    for row, example in zip(rows, examples, strict=True):
        completion = answer_alone(toy_model, example)
        text = extract_answer(completion, "answer")
        added = {"completion": completion, "model_output": text, "model_prediction": text}
        assert row == example.row | added


def test_results_contain_numbers_and_settings(folder, evaluation, capsys):
    rows, results = evaluation()
    correct = sum(mmau_match(row["model_output"], row["answer"], row["choices"]) for row in rows)
    expected = {
        "correct": correct,
        "total": 12,
        "accuracy": correct / 12,
        "interval": list(wilson_interval(correct, 12)),
        "unparseable": 1,  # an untrained model never follows the format
        "over_length": 0,
        "unreadable": [],
        "missing": 0,
        "unanswered": 0,
        "odd_answers": 0,
        "letters": 0,
        "audio_dir": str(folder),
        "model": str(folder / "model"),
        "prompt": "answer",
        "decoding": "greedy",
        "silence": False,
        "data_sha256": hashlib.sha256((folder / "test.jsonl").read_bytes()).hexdigest(),
    }
    assert results | expected == results
    assert results["versions"]["torch"] == torch.__version__
    tasks = results["by"]["task"]
    assert {name: part["total"] for name, part in tasks.items()} == {"music": 4, "sound": 4, "speech": 4}
    assert sum(part["correct"] for part in tasks.values()) == correct

    out = capsys.readouterr().out
    assert f"{correct} of 12" in out
    assert all(f"  {task} " in out for task in tasks)


def test_a_checkpoint_remembers_its_prompt(folder, tmp_path, evaluation):
    shutil.copytree(folder / "model", tmp_path / "trained")
    (tmp_path / "trained" / "run.json").write_text('{"prompt": "think"}')
    flags = ["--limit", 1, "--model", tmp_path / "trained"]
    _, results = evaluation(*flags)
    assert results["prompt"] == "think"
    _, results = evaluation(*flags, "--prompt", "plain", output="plain")
    assert results["prompt"] == "plain"


def test_rows_without_answers_are_answered_and_not_scored(folder, tmp_path, evaluation, capsys):
    """As in MMAU's Test; then an unreadable row is not wrong either."""
    rows = []
    for row, _ in read_rows(str(folder / "test.jsonl"))[0]:
        del row["answer"]
        rows.append(row)
    path = write(tmp_path / "rows.json", [*rows, "not a question"], as_list=True)
    predictions, results = evaluation("--data", path, "--audio_dir", folder)
    assert "nothing to score" in capsys.readouterr().out
    assert (results["accuracy"], results["interval"]) == (None, None)
    assert (results["total"], results["unanswered"], len(results["unreadable"])) == (0, 13, 1)
    for row, prediction in zip(rows, predictions):
        assert row.items() <= prediction.items()
        assert prediction["model_output"]


def test_clips_longer_than_the_window_are_counted(tmp_path, evaluation, capsys):
    for name, samples in (("short", 20_000), ("long", 80_000)):
        soundfile.write(tmp_path / f"{name}.wav", np.full(samples, 0.1), 16_000)
    path = write(tmp_path / "rows", [OWN | {"audio": "short.wav"}, OWN | {"audio": "long.wav"}])
    _, results = evaluation("--data", path)
    assert results["over_length"] == 1
    assert "1 clips are longer than the model's window" in capsys.readouterr().out


def test_clips_found_by_their_file_name_alone_are_reported(folder, evaluation, capsys):
    evaluation("--audio_dir", folder / "train")  # its clips have the same names
    out = capsys.readouterr().out
    assert "12 clips are not at their path and were found by their file name alone" in out
    assert f"test.jsonl:1, as {folder / 'train' / '0000.wav'}" in out


def test_silence_hides_the_clips(folder, tmp_path, evaluation):
    """The same question about clips of equal length gets different answers, but only one with silence."""
    rows = []
    for i in range(6):
        wave, _ = soundfile.read(folder / "test" / f"{i:04d}.wav")
        soundfile.write(tmp_path / f"{i}.wav", np.resize(wave, 20_000), 16_000)
        rows.append(OWN | {"audio": f"{i}.wav"})
    path = write(tmp_path / "rows", rows)
    with_sound, _ = evaluation("--data", path)
    silent, results = evaluation("--data", path, "--silence", output="silent")
    assert len({row["completion"] for row in with_sound}) > 1
    assert len({row["completion"] for row in silent}) == 1
    assert results["silence"] is True


def test_decoding_follows_the_models_generation_config(folder, tmp_path, evaluation):
    """With a greedy config of its own it equals our greedy decoding; the toy's own config samples."""
    greedy, _ = evaluation()
    shutil.copytree(folder / "model", tmp_path / "greedy")
    eos_ids = GenerationConfig.from_pretrained(folder / "model").eos_token_id
    config = GenerationConfig(do_sample=False, eos_token_id=eos_ids, pad_token_id=3)
    config.save_pretrained(tmp_path / "greedy")
    own, _ = evaluation("--decoding", "model", "--model", tmp_path / "greedy", output="own")
    assert own == greedy

    first, _ = evaluation("--decoding", "model", "--seed", 1, output="first")
    again, _ = evaluation("--decoding", "model", "--seed", 1, output="again")
    other, _ = evaluation("--decoding", "model", "--seed", 2, output="other")
    assert first == again
    assert first != other
    assert first != greedy


@pytest.mark.slow
@pytest.mark.parametrize("limit, fsdp", [(12, False), (11, False), (11, True)])
def test_two_processes_score_each_row_once(tmp_path, evaluation, flags, limit, fsdp):
    flags = [*flags, "--limit", limit, "--batch_size", 4, "--hearing", "--orders", 2]
    one, results_one = evaluation(*flags)
    launch("import evaluate; evaluate.main()", *flags, "--output", tmp_path / "two", fsdp=fsdp)
    assert len(one) == limit
    assert read(tmp_path / "two" / "predictions.json") == one

    results_two = read(tmp_path / "two" / "results.json")
    assert (results_one.pop("processes"), results_two.pop("processes")) == (1, 2)
    del results_one["seconds"], results_two["seconds"]
    assert results_one == results_two


def test_ask_answers_one_question_about_one_clip(folder, run_evaluate, capsys, toy_model):
    example = load_examples(str(folder / "test.jsonl"))[0]
    question = ["--question", example.question, "--choices", *example.choices]
    run_evaluate("--model", folder / "model", "--max_new_tokens", 4, "--ask", example.audio, *question)
    completion = answer_alone(toy_model, example)
    text = extract_answer(completion, "answer")
    assert capsys.readouterr().out == f"{completion}\nanswer: {text} (not one of the options)\n"


def test_ask_never_takes_another_clip_of_the_same_name(folder, run_evaluate, monkeypatch):
    monkeypatch.chdir(folder / "test")
    with pytest.raises(BadInput, match="elsewhere/0000.wav: no such audio file"):
        run_evaluate("--ask", "elsewhere/0000.wav", "--question", "What?", "--choices", "dog", "cat")


# ---------------------------------------------------------------- scoring


@pytest.fixture
def score(tmp_path, run_evaluate):
    """Score rows with predictions; returns the results."""

    def run(rows, name="p"):
        run_evaluate("--score", write(tmp_path / f"{name}.json", rows, as_list=True))
        return read(tmp_path / f"{name}.results.json")

    return run


def is_correct_by_the_rule(prediction, answer, choices):
    """The benchmark's rule, word by word, without sets or regular expressions."""

    def words(text):
        groups = groupby(text.lower(), lambda letter: letter.isalnum() or letter == "_")
        return ["".join(group) for is_word, group in groups if is_word]

    predicted = words(prediction)
    correct = words(answer)
    for word in correct:
        if word not in predicted:
            return False
    for choice in choices:
        for word in words(choice):
            if word in predicted and word not in correct:
                return False
    return len(predicted) > 0


WORDS = "dog Dog cat a barking 2 2.5 é naïve 犬 x_y O'Neil well-known ß İ ? 𝟜".split() + [""]
GROUPS = {
    "task": ["sound", "music", "speech"],
    "difficulty": ["easy", "hard"],
    "sub-category": ["one", "two", "three", "four"],
    "modality": ["sound", "mix-sound-speech"],  # MMAR's
}


def random_rows(n, seed):
    """Rows like the benchmarks', with predictions of every kind."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        choices = [" ".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(rng.randint(2, 8))]
        choices += rng.choices(choices, k=rng.randint(0, 1))  # sometimes an option appears twice
        answer = rng.choice(choices) or "dog"
        other = rng.choice(choices)
        predictions = [
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
        row = {"id": str(i), "question": "?", "choices": choices, "answer": answer}
        row |= {key: rng.choice(names) for key, names in GROUPS.items()}
        row[rng.choice(["model_output", "model_prediction"])] = rng.choice(predictions)
        rows.append(row)
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_the_benchmarks_in_every_group(score, seed):
    rows = random_rows(2000, seed)
    results = score(rows)
    correct = Counter()
    total = Counter()
    for row in rows:
        prediction = row.get("model_output", row.get("model_prediction"))
        is_correct = is_correct_by_the_rule(prediction, row["answer"], row["choices"])
        for group in ["all", *((key, row[key]) for key in GROUPS)]:
            correct[group] += is_correct
            total[group] += 1
    assert (results["correct"], results["total"]) == (correct["all"], 2000)
    assert 200 < correct["all"] < 1800
    assert results["by"].keys() == GROUPS.keys()
    for key, names in GROUPS.items():
        assert results["by"][key].keys() == set(names)
        for name, part in results["by"][key].items():
            assert (part["correct"], part["total"]) == (correct[key, name], total[key, name])


ROW = {"question": "What barks?", "choices": ["dog", "cat"], "answer": "dog"}
RIGHT = ROW | {"model_output": "dog"}


def test_rows_without_a_prediction_are_wrong_and_counted(score, capsys):
    results = score([ROW, RIGHT, ROW])
    assert (results["correct"], results["total"], results["missing"]) == (1, 3, 2)
    assert "2 rows have no prediction" in capsys.readouterr().out


@pytest.mark.parametrize("answer, is_odd", [("B", 1), (1, 1), ("cat", 1), ("B. cat", 0), ("b cat", 0)])
def test_answers_that_are_not_an_option_are_counted(score, capsys, answer, is_odd):
    """By the rule, hardly any prediction is correct if the answers are letters or indices."""
    results = score([{"choices": ["A. dog", "B. cat"], "answer": answer, "model_output": "B. cat"}])
    assert (results["odd_answers"], results["correct"]) == (is_odd, 1 - is_odd)
    assert ("1 rows have an answer that is not among" in capsys.readouterr().out) == bool(is_odd)


LETTERED = {"choices": ["dog", "cat", "a"], "answer": "dog"}


@pytest.mark.parametrize(
    "prediction, letters",
    [("A", 0), ("B", 1), ("(b)", 1), ("2", 1), ("b.", 1), ("dog", 0), ("bc", 0), ("", 0)],
)
def test_predictions_that_are_letters_are_counted(score, capsys, prediction, letters):
    """MMAU's rule scores a bare letter 0, unless it is an option; other benchmarks want one."""
    results = score([LETTERED | {"model_output": prediction}])
    assert results["letters"] == letters
    assert ("1 predictions are a letter or an index" in capsys.readouterr().out) == bool(letters)


def test_scoring_again_keeps_what_the_evaluation_knew(folder, tmp_path, evaluation, run_evaluate):
    rows = [row for row, _ in read_rows(str(folder / "test.jsonl"))[0]]
    rows[2]["choices"] = []
    rows[3] = 5
    path = write(tmp_path / "rows.json", rows, as_list=True)
    _, before = evaluation("--data", path, "--audio_dir", folder)
    assert (before["total"], len(before["unreadable"])) == (12, 2)

    predictions = tmp_path / "eval" / "predictions.json"
    run_evaluate("--score", predictions)
    assert read(tmp_path / "eval" / "results.json") == before

    write(predictions, [RIGHT], as_list=True)  # what was known does not apply to other predictions
    run_evaluate("--score", predictions)
    after = read(tmp_path / "eval" / "results.json")
    assert after["total"] == 1
    assert after["unparseable"] is None
    assert "model" not in after


def test_scores_of_two_files_in_a_folder_do_not_overwrite_each_other(tmp_path, run_evaluate):
    for name, prediction in (("predictions", "dog"), ("other", "cat")):
        path = write(tmp_path / f"{name}.json", [ROW | {"model_output": prediction}])
        run_evaluate("--score", path)
    assert read(tmp_path / "results.json")["accuracy"] == 1
    assert read(tmp_path / "other.results.json")["accuracy"] == 0


# ---------------------------------------------------------------- does it listen?

CLIPS = {"task": "sound", "question": "What barks?", "choices": ["dog", "cat", "cow"], "answer": "dog"}


def ten_questions():
    """Hand-made answers: seven are right with the clip, two with silence, three with another clip."""
    rows = []
    for i in range(10):
        row = CLIPS | {"id": i, "task": "sound" if i < 6 else "music"}
        row["model_output"] = "dog" if i < 7 else "cat"
        row["silence_output"] = "dog" if i in (0, 9) else "cat"
        row["other_output"] = "dog" if i in (0, 1, 2) else "cow"
        rows.append(row)
    return rows


def test_the_gains_of_ten_questions(score, capsys):
    unreadable = CLIPS | {"model_output": "", "silence_output": None, "other_output": None}
    gain = score([*ten_questions(), unreadable])["audio_gain"]
    assert gain["total"] == 10
    assert [gain[name]["correct"] for name in ("clip", "silence", "other")] == [7, 2, 3]
    # discordant pairs: right only with silence 1, only with the clip 6; with another clip 0 and 4
    assert gain["gain_over_silence"]["gain"] == pytest.approx(0.5)
    assert gain["gain_over_other"]["gain"] == pytest.approx(0.4)
    assert gain["gain_over_silence"]["p"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert gain["gain_over_other"]["p"] == pytest.approx(2 / 2**4)
    # Bonett and Price: 7 / 12 - 2 / 12, and sqrt((9 / 12 - (5 / 12)^2) / 12)
    half = 1.959964 * ((9 / 12 - (5 / 12) ** 2) / 12) ** 0.5
    assert gain["gain_over_silence"]["interval"] == pytest.approx([5 / 12 - half, 5 / 12 + half])
    sound, music = gain["by_task"]["sound"], gain["by_task"]["music"]
    assert (sound["total"], sound["gain_over_silence"]["gain"]) == (6, pytest.approx(5 / 6))
    assert (music["total"], music["gain_over_silence"]["gain"]) == (4, pytest.approx(0))
    out = capsys.readouterr().out
    assert re.search(r"overall +70\.0 +20\.0 +30\.0 +\+50\.0 .* \+40\.0 .* 10$", out, re.MULTILINE)


def test_the_orders_of_ten_questions(score, capsys):
    """Six are right in every order, two only where the right option is first, two always take the last."""
    rows = []
    for i in range(10):
        outputs = ["dog", "dog", "dog"]
        if i in (6, 7):
            outputs = ["dog", "cat", "cow"]  # always the first option
        elif i > 7:
            outputs = ["cow", "dog", "cat"]  # always the last one
        rows.append(CLIPS | {"id": i, "model_output": outputs[0], "order_outputs": outputs})
    pair = CLIPS | {"choices": ["cat", "dog"], "model_output": "dog", "order_outputs": ["dog", "cat"]}
    order = score([*rows, pair, CLIPS | {"order_outputs": [None, None]}])["option_order"]
    assert (order["orders"], order["total"]) == (3, 11)
    means = [1] * 6 + [1 / 3] * 4 + [1 / 2]
    assert order["accuracy"] == pytest.approx(np.mean(means))
    half = 1.959964 * np.std(means, ddof=1) / 11**0.5
    assert order["interval"] == pytest.approx([np.mean(means) - half, np.mean(means) + half])
    assert order["alike"] == pytest.approx(6 / 11)
    places = {place: (part["correct"], part["total"]) for place, part in order["by_place"].items()}
    assert places == {"1": (8, 11), "2": (7, 11), "3": (8, 10)}
    out = capsys.readouterr().out
    assert "3 orders of the options, 11 questions: mean accuracy 71.2%" in out
    assert "same answer in all orders: 54.5%" in out
    assert re.search(r"right option at position 2: 63\.6% .* of 11$", out, re.MULTILINE)


def test_files_without_such_answers_have_no_gain(score, capsys):
    assert not {"audio_gain", "option_order"} & score([RIGHT]).keys()
    assert "hearing" not in capsys.readouterr().out


def test_the_three_answers_are_those_to_the_three_clips(folder, tmp_path, evaluation):
    """They equal an evaluation with silence, and one on a file that names the other clips."""
    rows, results = evaluation("--hearing")
    plain, _ = evaluation(output="plain")
    silent, _ = evaluation("--silence", output="silent")
    questions = [row for row, _ in read_rows(str(folder / "test.jsonl"))[0]]
    swapped = [row | {"audio": answered["other_audio"]} for row, answered in zip(questions, rows)]
    other, _ = evaluation("--data", write(tmp_path / "swapped", swapped), output="other")
    for i, row in enumerate(rows):
        assert row["completion"] == plain[i]["completion"]
        assert row["silence_output"] == silent[i]["model_output"]
        assert row["other_output"] == other[i]["model_output"]
    assert results["hearing"] is True and results["audio_gain"]["total"] == 12


def test_the_other_clip_is_fixed_by_the_seed_and_has_another_answer(folder):
    examples = load_examples(str(folder / "train.jsonl"))
    broken = replace(examples[3], problem="not a question")
    examples[3] = broken
    answers = {example.audio: example.answer for example in examples}
    changed = with_other_clips(examples, seed=1)
    assert changed[3] is broken
    for example, other in zip(examples, changed):
        if example is not broken:
            assert answers[other.audio] != example.answer
            assert replace(other, audio=example.audio) == example
    assert len({other.audio for other in changed}) > 15  # not one clip for all
    assert changed == with_other_clips(examples, seed=1) != with_other_clips(examples, seed=2)


def test_a_file_with_one_answer_has_no_other_clips(folder, tmp_path, evaluation):
    for i in range(2):
        shutil.copy(folder / "test" / f"{i:04d}.wav", tmp_path / f"{i}.wav")
    rows = [OWN | {"audio": "0.wav"}, OWN | {"audio": "1.wav", "answer": " Cat"}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadInput, match="rows.jsonl:1: no other question has another answer and clip"):
        evaluation("--data", path, "--hearing")
    assert not (tmp_path / "eval" / "predictions.json").exists()


def test_a_model_that_ignores_its_audio_has_no_gain(folder, evaluation, monkeypatch):
    """It gets some questions right, but about as many with silence."""
    monkeypatch.setattr("model.encode_audio", lambda *args: 0 * encode_audio(*args))
    monkeypatch.setattr("rewards.mmau_match", lambda text, *_: len(text) % 2 == 1)
    _, results = evaluation("--data", folder / "train.jsonl", "--hearing")
    gain = results["audio_gain"]
    assert gain["clip"]["correct"] == gain["silence"]["correct"]  # equal lengths, so equal prompts
    assert 0 < gain["clip"]["accuracy"] < 1
    for name in ("gain_over_silence", "gain_over_other"):
        low, high = gain[name]["interval"]
        assert low < 0 < high


def test_orders_move_the_options_and_keep_the_question(folder, tmp_path, evaluation):
    """The answers equal those for a file in which the options were moved by hand."""
    rows = []
    for row, _ in read_rows(str(folder / "test.jsonl"))[0]:
        rows.append(row | {"choices": row["choices"][:3], "answer": row["choices"][1]})
    rows[0] |= {"choices": rows[0]["choices"][:2]}
    path = write(tmp_path / "rows", rows)
    flags = ["--audio_dir", folder]
    answered, results = evaluation("--data", path, *flags, "--orders", 3)
    moved_once = with_rotated_options(load_examples(path, str(folder)), 1)
    assert moved_once[0].choices == rows[0]["choices"][::-1]
    assert moved_once[1].choices == rows[1]["choices"][1:] + rows[1]["choices"][:1]
    for shift in range(3):
        moved = [row | {"choices": row["choices"][shift:] + row["choices"][:shift]} for row in rows]
        path = write(tmp_path / f"moved{shift}", moved)
        expected, _ = evaluation("--data", path, *flags, output=f"by_hand{shift}")
        for i, (row, by_hand) in enumerate(zip(answered, expected)):
            if i > 0 or shift < 2:
                assert row["order_outputs"][shift] == by_hand["model_output"]
    assert len(answered[0]["order_outputs"]) == 2  # the third order of two options is the first again
    assert {place: part["total"] for place, part in results["option_order"]["by_place"].items()} == {
        "1": 12,
        "2": 12,
        "3": 11,
    }


def test_results_name_the_release_of_a_known_file(folder, evaluation, monkeypatch, capsys):
    digest = hashlib.sha256((folder / "test.jsonl").read_bytes()).hexdigest()
    _, results = evaluation("--limit", 1)
    assert results["release"] == "unknown"
    monkeypatch.setitem(RELEASES, digest, "Toy v1")
    _, results = evaluation("--limit", 1, output="known")
    assert results["release"] == "Toy v1"
    assert "release Toy v1, SHA-256" in capsys.readouterr().out


# ---------------------------------------------------------------- comparing


def test_two_files_are_compared_row_by_row(tmp_path, run_evaluate, capsys):
    first = random_rows(300, 0)
    second = [row | {"model_output": row["answer"]} for row in first]
    paths = [
        write(tmp_path / "first.json", first),
        write(tmp_path / "second.json", second[::-1]),  # the order of the rows does not matter
    ]
    run_evaluate("--compare", *paths)
    out = capsys.readouterr().out

    pairs = [(judge(a, ""), judge(b, "")) for a, b in zip(first, second)]
    before = sum(a for a, _ in pairs) / 300
    after = sum(b for _, b in pairs) / 300
    difference, low, high, p = paired_difference(pairs)
    overall = next(line for line in out.splitlines() if line.startswith("overall"))
    numbers = [float(number) for number in re.findall(r"[-+]?[\d.]+(?:e-\d+)?", overall)]
    percent = [100 * value for value in (before, after, difference, low, high)]
    assert numbers[:5] == pytest.approx(percent, abs=0.051)
    assert numbers[5] == pytest.approx(p, rel=0.05)
    assert numbers[6] == 300
    for task in GROUPS["task"]:
        rows = sum(row["task"] == task for row in first)
        assert re.search(rf"^  {task} .* {rows}$", out, re.MULTILINE)


def test_rows_that_only_one_file_answers_count_as_wrong(tmp_path, run_evaluate, capsys):
    questions = [ROW | {"id": i} for i in range(4)]
    answered = [row | {"model_output": "dog"} for row in questions]
    first = write(tmp_path / "first.json", answered)
    second = write(tmp_path / "second.json", answered[:1] + questions[1:])
    run_evaluate("--compare", first, second)
    out = capsys.readouterr().out
    assert "second.json: 3 rows have no prediction and count as wrong" in out
    assert re.search(r"overall +100.0 +25.0 +-75.0", out)


# ---------------------------------------------------------------- checkpoints


def test_adapters_are_evaluated_like_any_model(folder, tmp_path, evaluation, flags, run_evaluate):
    run = tmp_path / "run"
    run_script("train_sft", folder, run, max_steps=4, lora_rank=4, save_every=2, merge=True)
    base, _ = evaluation(output="base")
    adapters, _ = evaluation("--model", run, output="adapters")
    merged, _ = evaluation("--model", run / "merged", output="merged")
    checkpoint, _ = evaluation("--model", run / "checkpoint-2", output="checkpoint")
    assert adapters == merged
    assert base != adapters != checkpoint != base

    run_evaluate(*flags, "--checkpoints", run)
    assert read(run / "eval" / "checkpoint-2" / "predictions.json") == checkpoint


def test_each_complete_checkpoint_is_evaluated_once(folder, tmp_path, flags, run_evaluate, capsys):
    run = tmp_path / "run"
    for step in (5, 10, 100):
        shutil.copytree(folder / "model", run / f"checkpoint-{step}")
    (run / "checkpoint-100" / "config.json").unlink()  # incomplete
    flags += ["--checkpoints", run]
    run_evaluate(*flags)
    out = capsys.readouterr().out
    assert re.findall(r"^ +(\d+) .* to ", out, re.MULTILINE) == ["5", "10"]
    assert not (run / "eval" / "checkpoint-100").exists()

    results = run / "eval" / "checkpoint-5" / "results.json"
    written = results.stat().st_mtime_ns
    shutil.copytree(folder / "model", run / "checkpoint-15")
    run_evaluate(*flags)
    assert results.stat().st_mtime_ns == written
    assert (run / "eval" / "checkpoint-15" / "results.json").exists()

    with pytest.raises(BadInput, match="made with another max_new_tokens; name another --output"):
        run_evaluate(*flags, "--max_new_tokens", 5)
    os.utime(run / "checkpoint-5" / "config.json")  # as if another run had saved it
    with pytest.raises(BadInput, match="checkpoint-5: made with another run, which was in this folder"):
        run_evaluate(*flags)


def test_curves_of_two_runs_are_not_mixed(folder, tmp_path, flags, run_evaluate):
    for name in ("one", "two"):
        shutil.copytree(folder / "model", tmp_path / name / "checkpoint-5")
    flags += ["--output", tmp_path / "curve"]
    run_evaluate(*flags, "--checkpoints", tmp_path / "one")
    run_evaluate(*flags, "--checkpoints", tmp_path / "one")
    with pytest.raises(BadInput, match="checkpoint-5: made with another model; name another --output"):
        run_evaluate(*flags, "--checkpoints", tmp_path / "two")


def test_the_curve_shows_each_step_and_marks_the_best(capsys):
    correct = {5: 2, 10: 9, 100: 4}
    show_curve({step: tally([True] * n + [False] * (12 - n)) for step, n in correct.items()})
    lines = capsys.readouterr().out.splitlines()[2:]
    for line, (step, n) in zip(lines, correct.items()):
        low, high = wilson_interval(n, 12)
        numbers = [float(number) for number in re.findall(r"[\d.]+", line)]
        assert numbers == pytest.approx([step, 100 * n / 12, 100 * low, 100 * high], abs=0.051)
        assert line.endswith("<- best") == (step == 10)
    assert "optimistic" in lines[3]


# ---------------------------------------------------------------- bad flags and bad files


BAD_FLAGS = {
    "predictions exist": ([], "predictions.json: already exists"),
    "no data": (["--data", ""], "--data is missing"),
    "unknown prompt": (["--prompt", "shout", "--output", "elsewhere"], "plain, answer, think"),
    "unknown decoding": (["--decoding", "beam"], "greedy or model"),
    "negative limit": (["--limit", -1], "--limit must be at least 0"),
    "empty batches": (["--batch_size", 0], "--batch_size must be at least 1"),
    "no clips": (["--audio_dir", "nowhere"], "no audio file .*12 of 12 clips are missing"),
    "no checkpoints": (["--checkpoints", "nowhere"], "nowhere: contains no complete checkpoint-N"),
    "output below a file": (["--output", f"{__file__}/eval"], "--output .*/eval: NotADirectoryError"),
    "silence twice": (["--hearing", "--silence"], "--hearing and --silence cannot be combined"),
    "negative orders": (["--orders", -1], "--orders must be at least 0"),
    "two modes": (["--score", "a", "--ask", "b"], "--score and --ask cannot be combined"),
    "nothing to score": (["--score", "nowhere"], "nowhere: FileNotFoundError"),
    "one file to compare": (["--compare", "a"], "takes two files"),
    "no question": (["--ask", "a.wav", "--choices", "c", "d"], "--ask: no question"),
    "one option": (["--ask", "a.wav", "--question", "b", "--choices", "c"], "--ask: no list of at least two"),
}


@pytest.mark.parametrize("more, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_are_refused(tmp_path, monkeypatch, flags, run_evaluate, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "predictions.json").touch()
    with pytest.raises(BadInput, match=message):
        run_evaluate(*flags, "--output", tmp_path / "eval", *more)
    assert os.listdir(tmp_path / "eval") == ["predictions.json"]


AVQA = {"multi_choice": ["a", "b"], "model_output": "a"}
BAD_PREDICTIONS = {
    "no predictions": ([ROW], "no row has a prediction"),
    "no rows": ([], "contains no rows"),
    "no options": ([{"answer": "a", "model_output": "a"}], "p.json: row 1: no list of options"),
    "not an object": ([RIGHT, 3], "p.json: row 2: not a JSON object"),
    "index is a float": ([AVQA | {"answer": 1.0}], "row 1: answer must be an index from 0 to 1, not 1.0"),
    "index too large": ([AVQA | {"answer": 2}], "row 1: answer must be an index from 0 to 1, not 2"),
}


@pytest.mark.parametrize("rows, message", BAD_PREDICTIONS.values(), ids=BAD_PREDICTIONS)
def test_predictions_that_cannot_be_scored_are_refused(tmp_path, score, rows, message):
    with pytest.raises(BadInput, match=message):
        score(rows)
    assert os.listdir(tmp_path) == ["p.json"]


QUESTIONS = [RIGHT | {"id": i} for i in range(3)]


def test_files_of_some_of_the_questions_are_compared_on_what_they_share(tmp_path, run_evaluate, capsys):
    paths = [
        write(tmp_path / f"{name}.json", rows) for name, rows in (("a", QUESTIONS), ("b", QUESTIONS[1:]))
    ]
    run_evaluate("--compare", *paths)
    out = capsys.readouterr().out
    assert "2 questions are in both files and are compared; 1 are only in the first file" in out
    (overall,) = [line for line in out.splitlines() if line.startswith("overall")]
    assert overall.split()[1:4] == ["100.0", "100.0", "+0.0"] and overall.split()[-1] == "2"


BAD_COMPARISONS = {
    "other questions": (QUESTIONS[:1], QUESTIONS[1:], "have no question in common"),
    "the same twice": (
        QUESTIONS,
        QUESTIONS + QUESTIONS[:1],
        "second.json:4: the same question as an earlier row",
    ),
    "no predictions": ([RIGHT], [ROW], "second.json: no row has a prediction"),
    "no answers": ([RIGHT | {"answer": ""}], [RIGHT | {"answer": ""}], "no answers to compare with"),
}


@pytest.mark.parametrize("first, second, message", BAD_COMPARISONS.values(), ids=BAD_COMPARISONS)
def test_files_that_cannot_be_compared_are_refused(tmp_path, run_evaluate, first, second, message):
    paths = [write(tmp_path / "first.json", first), write(tmp_path / "second.json", second)]
    with pytest.raises(BadInput, match=message):
        run_evaluate("--compare", *paths)
