"""`prepare_data avqa`, `check` and `filter`, and the command line; test_hub.py has `hub`."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import CONVERTED, OWN, ROOT, load_examples, run_script, write

import evaluate
from data import BadInput, check_audio, lock_folder
from tools import prepare_data


def write_tone(path, seconds=1.0, rate=16_000, channels=1):
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    soundfile.write(path, np.tile(wave[:, None], channels), rate, format=path.suffix[1:].upper())


def read(path):
    return [json.loads(line) for line in open(path)]


# ---------------------------------------------------------------- avqa

AVQA_NAMES = {  # video_name, and what people call the clip
    "a_000030": "a_30.wav",
    "-b_c_000030": "-b_c_000030.wav",
    "d_000030": "d_000000.wav",
    "e_000030": "e_30.flac",
    "f_000030": "f_000030.mp3",
    "g_000030": "g_000000.ogg",
}
AVQA_UNUSABLE = [  # what is wrong with a row, and the reason given
    ({"multi_choice": []}, "no list of at least two options (key 'multi_choice')"),
    ({"multi_choice": ["dog"]}, "no list of at least two options (key 'multi_choice')"),
    ({"multi_choice": ["dog", None]}, "option 2 is not text: None"),
    ({"answer": 2}, "answer must be an index from 0 to 1, not 2"),
    ({"answer": "cat"}, "answer must be an index from 0 to 1, not 'cat'"),
    ({"answer": None}, "has no answer"),
    ({"video_name": "gone_000030"}, "{clips}/gone_30.wav: no such audio file"),
    ({"video_name": "text_000030"}, "{clips}/text_30.wav: cannot be read as audio"),
]


def avqa_row(**columns):
    row = {"video_name": "a_000030", "question_text": "What is in the video?", "multi_choice": ["dog", "cat"]}
    return row | {"answer": 1, "video_id": 7, "question_type": "Which"} | columns


@pytest.fixture
def clips(tmp_path):
    """A folder with the clips of AVQA_NAMES, and one that is not audio."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in AVQA_NAMES.values():
        write_tone(folder / name, seconds=2)
    (folder / "text_30.wav").write_text("not a sound")
    return folder


def test_avqa_becomes_training_rows(tmp_path, clips, capsys):
    usable = [avqa_row(id=number, video_name=name) for number, name in enumerate(AVQA_NAMES)]
    unusable = [avqa_row(**columns) for columns, _ in AVQA_UNUSABLE]
    questions = write(tmp_path / "train_qa.json", usable + unusable, as_list=True)
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "train.jsonl"
    prepare_data.avqa(questions, str(clips), str(output))

    columns = {"question": "What is in the audio?", "choices": ["dog", "cat"], "answer": "cat"}
    expected = []
    for number, name in enumerate(AVQA_NAMES.values()):
        expected.append({"audio": f"../clips/{name}", **columns, "id": number, "question_type": "Which"})
    assert read(output) == expected
    assert check_audio(load_examples(str(output))) == 0  # found without --audio_dir

    left_out = read(tmp_path / "out" / "train.left_out.jsonl")
    assert [entry["row"] for entry in left_out] == unusable
    for number, (entry, (_, reason)) in enumerate(zip(left_out, AVQA_UNUSABLE), len(usable) + 1):
        assert entry["reason"].startswith(f"{questions}: row {number}: {reason.format(clips=clips)}")
    out = capsys.readouterr().out
    assert f"14 rows: 6 in {output}, 8 unusable\n" in out
    assert f"rows whose clip is not in {clips}: 1\n" in out


def test_the_file_of_r1_aqa_is_converted_too(tmp_path):
    write_tone(tmp_path / "a.wav")
    output = tmp_path / "train.jsonl"
    (tmp_path / "train.left_out.jsonl").write_text("of an earlier conversion")
    prepare_data.avqa(write(tmp_path / "r1.jsonl", [CONVERTED]), str(tmp_path), str(output))
    (example,) = load_examples(str(output))
    assert (example.audio, example.answer) == (str(tmp_path / "a.wav"), "cat")
    assert not (tmp_path / "train.left_out.jsonl").exists()


def test_avqa_refuses_in_one_line_and_writes_nothing(tmp_path, clips):
    questions = write(tmp_path / "train_qa.json", [avqa_row()], as_list=True)
    (tmp_path / "there.jsonl").touch()
    cases = [
        ("nowhere", "train.jsonl", "--audio_dir nowhere: no such folder"),
        (tmp_path, "train.jsonl", "none of 1 rows can be used; the first: .*a_30.wav: no such audio file"),
        (clips, "nowhere/train.jsonl", "nowhere/train.jsonl: cannot be written"),
        (clips, "there.jsonl", "there.jsonl: already exists"),
    ]
    for audio_dir, output, message in cases:
        with pytest.raises(BadInput, match=message):
            prepare_data.avqa(questions, str(audio_dir), str(tmp_path / output))
        assert not list(tmp_path.glob("train*.jsonl*"))


# ---------------------------------------------------------------- check


def test_check_names_everything_that_is_wrong(tmp_path, capsys):
    write_tone(tmp_path / "a.wav", 1, 16_000, 1)
    write_tone(tmp_path / "b.wav", 31, 8_000, 2)
    write_tone(tmp_path / "c.wav", 2, 48_000, 6)
    (tmp_path / "text.wav").write_text("not a sound")
    unanswered = {key: value for key, value in OWN.items() if key != "answer"}
    rows = [
        OWN | {"id": 1, "task": "sound"},
        OWN | {"id": 1, "audio": "folder/b.wav", "task": "music"},
        OWN | {"id": None, "audio": "c.wav", "choices": ["cat", "cat", "dog"], "task": "music"},
        unanswered | {"id": None},
        OWN | {"answer": "bird"},
        OWN | {"audio": "text.wav"},
        OWN | {"audio": "gone.wav"},
        OWN | {"choices": []},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit) as status:
        prepare_data.check(path)
    assert status.value.code == 1

    expected = [
        "unusable: PATH:5: answer 'bird' is not among the options ['dog', 'cat']",
        "unusable: PATH:6: FOLDER/text.wav: cannot be read as audio .*",
        "unusable: PATH:7: FOLDER/gone.wav: no such audio file",
        "unusable: PATH:8: no list of at least two options (key 'choices')",
        "warning: PATH:2: has the same id as PATH:1: 1",
        "warning: PATH:2: there is no clip at its path; a file of the same name is used: FOLDER/b.wav",
        "warning: PATH:3: an option is repeated: ['cat', 'cat', 'dog']",
        "PATH: 8 rows, 4 unusable, 3 warnings",
        "clips: 4, 0.01 h in all; 1.0 to 31.0 s, median 1.5 s; 1 longer than 30 s",
        "sampling rates in Hz: 8000: 1, 16000: 2, 48000: 1",
        "channels: 1: 2, 2: 1, 6: 1",
        "only the headers of the clips were read: --decode reads all of their samples",
        "options per question: 2: 6, 3: 1",
        "task: None: 4, music: 2, sound: 1",
        "1 rows have no answer: they can be used for prediction, but not for training",
        "right without listening: most frequent answer elsewhere 100.0%, longest option 53.3%, "
        "chance 53.3% (5 questions)",
    ]
    printed = capsys.readouterr().out.replace(path, "PATH").replace(str(tmp_path), "FOLDER").splitlines()
    for line, pattern in zip(printed, expected, strict=True):
        assert line == pattern or re.fullmatch(pattern, line)


def test_check_finds_nothing_wrong_with_the_toy(folder, capsys):
    prepare_data.check(str(folder / "train.jsonl"), model=str(folder / "model"), decode=True)
    assert "24 rows, 0 unusable, 0 warnings" in capsys.readouterr().out


def test_check_reads_all_samples_only_with_decode(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    path = write(tmp_path / "rows.jsonl", [OWN])
    prepare_data.check(path)
    with pytest.raises(SystemExit):
        prepare_data.check(path, decode=True)
    assert "a.wav: has samples that are nan or inf" in capsys.readouterr().out


def test_check_finds_silence_and_options_that_the_rule_cannot_tell_apart(tmp_path, capsys):
    right_only = np.stack([np.zeros(16_000), np.full(16_000, 0.5)], 1)
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    soundfile.write(tmp_path / "right.wav", right_only, 16_000)
    choices = ["C# minor", "C minor", "5 dB", "-5 dB", "cat"]
    path = write(tmp_path / "rows.jsonl", [OWN, OWN | {"audio": "right.wav", "choices": choices}])
    prepare_data.check(path, decode=True)
    out = capsys.readouterr().out
    assert f"warning: {path}:1: the clip is silent: {tmp_path}/a.wav" in out
    assert f"{path}:2: channel 0, which is used, is silent, but channel 1 is not" in out
    assert "2 clips are silent, or silent in channel 0, which is used" in out
    assert f"{path}:2: MMAU's rule cannot tell 'C# minor' from 'C minor'" in out
    assert f"{path}:2: MMAU's rule cannot tell '5 dB' from '-5 dB'" in out and out.count("cannot tell") == 2


def test_check_tells_what_the_text_alone_gives_away(tmp_path, capsys):
    """Computed by hand: ties count in part, and a question does not count its own answer.

    The answers that count: dog (twice), cat (twice), bee, a seal and bird; not the one that is not an option.
    """
    write_tone(tmp_path / "a.wav", 1, 16_000, 1)
    rows = [
        (["dog", "cow", "pig"], "dog"),
        (["Dog ", "a cat"], "dog"),
        (["ant", "bee", "fly"], "bee"),
        (["bird", "cat", "hen", "owl"], "cat"),
        (["dog", "a seal"], "a seal"),
        (["dog", "a seal"], "bird"),
        (["bird", "ox"], "bird"),
        (["emu", "cat"], "cat"),
    ]
    questions = [OWN | {"choices": choices, "answer": answer} for choices, answer in rows]
    with pytest.raises(SystemExit):
        prepare_data.check(write(tmp_path / "rows.jsonl", questions))
    frequent = [1, 1, 1 / 3, 1 / 2, 0, 1 / 2, 1]
    longest = [1 / 3, 0, 1 / 3, 0, 1, 1, 1 / 2]
    chance = [1 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 2, 1 / 2, 1 / 2]
    percent = [f"{100 * sum(values) / 7:.1f}%" for values in (frequent, longest, chance)]
    guesses = f"most frequent answer elsewhere {percent[0]}, longest option {percent[1]}, chance {percent[2]}"
    assert f"right without listening: {guesses} (7 questions)" in capsys.readouterr().out.splitlines()


# ---------------------------------------------------------------- filter


def predicted(rows, outputs):
    """Rows as evaluate.py writes them, with these predictions."""
    predictions = []
    for row, output in zip(rows, outputs):
        predictions.append({**row, "model_output": output, "model_prediction": output, "completion": output})
    return predictions


@pytest.fixture
def answered(tmp_path):
    """Five questions and the predictions of a model: right, wrong, none, right, and no answer."""
    rows = [OWN | {"id": number, "odd": float("nan"), "model_output": "old"} for number in range(5)]
    rows[3] = CONVERTED
    del rows[4]["answer"]
    predictions = predicted(rows, ["A cat.", "dog", None, "cat", "cat"])
    file = write(tmp_path / "rows.jsonl", rows)
    return rows, file, write(tmp_path / "predictions.json", predictions, as_list=True)


@pytest.mark.parametrize("drop, kept", [("right", [1]), ("wrong", [0, 3])])
def test_filter_keeps_what_a_model_got_wrong_or_right(tmp_path, capsys, answered, drop, kept):
    rows, file, predictions = answered
    counts = "5 rows: 2 right, 1 wrong, 2 without an answer or a prediction"
    (tmp_path / "sub").mkdir()
    for output in (tmp_path / "kept.jsonl", tmp_path / "sub" / "kept.jsonl"):
        prepare_data.filter_rows(file, predictions, str(output), drop)
        assert json.dumps(read(output)) == json.dumps([rows[number] for number in kept])
        out = capsys.readouterr().out
        assert f"{counts}; {len(kept)} in {output}\n" in out
        in_another_folder = output.parent != tmp_path  # than the clips
        assert (f"--audio_dir {tmp_path}\n" in out) == in_another_folder


def test_filter_refuses_predictions_of_another_file(tmp_path, answered):
    rows, file, predictions = answered
    output = tmp_path / "kept.jsonl"

    def refuse(message, file=file, predictions=predictions):
        if isinstance(predictions, list):
            predictions = write(tmp_path / "p.jsonl", predictions)
        with pytest.raises(BadInput, match=message):
            prepare_data.filter_rows(file, predictions, str(output))

    changed = [rows[0], rows[1] | {"answer": "dog"}]
    refuse("p.jsonl:2: does not belong to .*rows.jsonl:2", predictions=predicted(changed, "ab"))
    refuse("p.jsonl:1: does not belong to .*rows.jsonl:1", predictions=predicted(rows[1:], "ab"))
    two = write(tmp_path / "two.jsonl", rows[:2])
    refuse("predictions.json: has 5 rows, but .*two.jsonl has only 2", file=two)
    right = predicted(rows[:1], ["cat"])
    refuse("no rows remain .5 rows: 1 right, 0 wrong, 4 without", predictions=right)
    assert not output.exists()
    output.touch()
    refuse("kept.jsonl: already exists")


def test_filter_takes_what_evaluate_wrote(folder, tmp_path, monkeypatch):
    """The first eight of twelve questions, without sound; one cannot be used. The rest can be trained on."""
    rows = read(folder / "test.jsonl")
    rows[2] = rows[2] | {"choices": []}
    questions = write(tmp_path / "rows.jsonl", rows)
    flags = f"--model {folder}/model --data {questions} --audio_dir {folder} --output {tmp_path}/eval"
    flags += " --max_new_tokens 4 --silence --limit 8"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags.split()])
    evaluate.main()
    output = tmp_path / "hard.jsonl"
    prepare_data.filter_rows(questions, str(tmp_path / "eval" / "predictions.json"), str(output))
    correct = json.loads((tmp_path / "eval" / "results.json").read_text())["correct"]
    kept = read(output)
    assert len(kept) == 7 - correct > 0 and rows[2] not in kept
    run_script("train_grpo", folder, tmp_path / "run", data=str(output), audio_dir=str(folder), max_steps=1)


# ---------------------------------------------------------------- command line


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    write_tone(tmp_path / "clips" / "a.wav")
    row = OWN | {"audio": "clips/a.wav"}
    write(tmp_path / "rows.jsonl", [row])
    write(tmp_path / "avqa.jsonl", [CONVERTED])
    write(tmp_path / "predictions.jsonl", predicted([row], ["dog"]))
    cases = [  # flags, exit status, what is printed
        ("hub rows.jsonl --output out --video_to_audio --limit 5", 0, "'What is in the audio?'"),
        ("hub rows.jsonl --output other --limit -1", 1, "--limit must be at least 0, not -1"),
        ("avqa avqa.jsonl --audio_dir clips --output train.jsonl", 0, "1 rows: 1 in train.jsonl, 0 unusable"),
        ("avqa avqa.jsonl --audio_dir clips", 2, "required: --output"),
        ("check avqa.jsonl --decode --audio_dir clips", 0, "1 rows, 0 unusable, 0 warnings"),
        ("check nowhere.jsonl", 1, "nowhere.jsonl: FileNotFoundError"),
        ("filter rows.jsonl --predictions predictions.jsonl --output hard.jsonl", 0, "1 in hard.jsonl"),
        ("filter rows.jsonl --predictions p --output o --drop hard", 2, "invalid choice: 'hard'"),
        ("convert", 2, "invalid choice"),
        ("--help", 0, "keep the questions that a model got wrong (or right)"),
        ("check --help", 0, "read all samples, not only the headers"),
    ]
    for flags, status, text in cases:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *flags.split()])
        code = 0
        try:
            prepare_data.main()
        except SystemExit as end:
            code = end.code
        except BadInput as error:
            code = 1
            print(error)
        printed = capsys.readouterr()
        assert code == status, flags
        assert text in printed.out + printed.err, flags


def test_a_folder_in_use_is_refused_in_one_line(tmp_path):
    lock = lock_folder(str(tmp_path / "out"))  # noqa: F841, locked until the test ends
    flags = ["hub", write(tmp_path / "rows.jsonl", [OWN]), "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "tools.prepare_data", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: --output {tmp_path}/out: another run is using this folder\n"
