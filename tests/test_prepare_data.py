import json
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import CONVERTED, OWN, ROOT, load_examples, write

import prepare_data
from data import BadInput, check_audio


def tone(seconds=1.0, rate=16_000):
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def avqa(name, **more):
    row = {"id": 1, "video_name": f"{name}_000030", "video_id": 1, "question_text": "What is in the video?"}
    row |= {
        "multi_choice": ["dog", "cat"],
        "answer": 1,
        "question_relation": "Both",
        "question_type": "Which",
    }
    return row | more


@pytest.fixture
def avqa_files(tmp_path):
    """AVQA with every naming habit and every dirty row; the clips, and what should come of them."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "lists").mkdir()
    names = {
        "a": "a_30.wav",
        "-b_c": "-b_c_000030.wav",
        "d": "d_000000.wav",
        "e": "e_30.flac",
        "f": "f_000030.mp3",
        "g": "g_000000.ogg",
    }
    for name in names.values():
        soundfile.write(tmp_path / "clips" / name, tone(2), 16_000, format=name.split(".")[1].upper())
    good = [avqa(name, id=n) for n, name in enumerate(names)]
    (tmp_path / "clips" / "text_30.wav").write_text("not a sound")
    (tmp_path / "clips" / "empty_30.wav").touch()
    bad = {
        "multi_choice": [
            {"id": 9, "video_name": "a_000030", "question_text": "?", "answer": 0},
            avqa("a", multi_choice=[]),
            avqa("a", multi_choice=["x"]),
        ],
        "option": [
            avqa("a", multi_choice=["x", ""]),
            avqa("a", multi_choice=["x", None]),
            avqa("a", multi_choice=["x", ["y"]]),
        ],
        "index": [avqa("a", answer=4), avqa("a", answer="cat")],
        "no answer": [avqa("a", answer=None)],
        "no such audio file": [avqa("gone"), avqa("gone_too")],
        "cannot be read": [avqa("text"), avqa("empty")],
    }
    rows = good + [row for part in bad.values() for row in part]
    return write(tmp_path / "lists" / "train_qa.json", rows, as_list=True), names, bad


def test_avqa_becomes_training_rows(tmp_path, capsys, avqa_files):
    questions, names, bad = avqa_files
    (tmp_path / "out").mkdir()
    prepare_data.avqa(
        questions, audio_dir=str(tmp_path / "clips"), output=str(tmp_path / "out" / "train.jsonl")
    )
    examples = load_examples(
        str(tmp_path / "out" / "train.jsonl")
    )  # no --audio_dir: paths are relative to the file
    assert check_audio(examples) == 0
    assert [example.audio for example in examples] == [
        str(tmp_path / "clips" / name) for name in names.values()
    ]
    for n, example in enumerate(examples):
        assert (example.question, example.choices, example.answer) == (
            "What is in the audio?",
            ["dog", "cat"],
            "cat",
        )
        assert example.row["id"] == n and example.row["question_type"] == "Which"
    lost = [json.loads(line) for line in open(tmp_path / "out" / "train.left_out.jsonl")]
    assert [entry["row"] for entry in lost] == [row for part in bad.values() for row in part]
    for entry, word in zip(lost, [word for word, part in bad.items() for _ in part]):
        assert word in entry["reason"] and "train_qa.json: row " in entry["reason"]
    assert "19 questions: 6 found, 2 without a clip, 11 unusable" in capsys.readouterr().out


def test_r1_aqas_own_file_is_converted_too(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 16_000)
    rows = write(tmp_path / "r1.jsonl", [CONVERTED])
    prepare_data.avqa(rows, audio_dir=str(tmp_path), output=str(tmp_path / "train.jsonl"))
    (example,) = load_examples(str(tmp_path / "train.jsonl"))
    assert (example.audio, example.answer) == (str(tmp_path / "a.wav"), "cat")
    assert not (tmp_path / "train.left_out.jsonl").exists()


def test_a_conversion_that_cannot_be_is_refused_and_leaves_nothing(tmp_path, avqa_files):
    def convert(audio_dir, output=tmp_path / "train.jsonl"):
        prepare_data.avqa(avqa_files[0], audio_dir=str(audio_dir), output=str(output))

    with pytest.raises(BadInput, match="nowhere: no such folder"):
        convert("nowhere")
    with pytest.raises(
        BadInput,
        match="none of 19 rows can be used; the first: .*: row 1: .*a_30.wav: no such audio file",
    ):
        convert(tmp_path / "lists")
    with pytest.raises(BadInput, match="cannot be written"):
        convert(tmp_path / "clips", tmp_path / "nowhere" / "train.jsonl")
    assert not list(tmp_path.glob("train*"))
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(BadInput, match="already there"):
        convert(tmp_path / "clips")


def test_check_names_all_that_is_wrong(tmp_path, capsys):
    for name, seconds, rate, channels in (("a", 1, 16_000, 1), ("b", 31, 8_000, 2), ("c", 2, 48_000, 6)):
        soundfile.write(tmp_path / f"{name}.wav", np.tile(tone(seconds, rate)[:, None], channels), rate)
    (tmp_path / "text.wav").write_text("not a sound")
    rows = [
        OWN | {"id": 1, "task": "sound"},
        OWN | {"id": 1, "audio": "b.wav", "task": "music"},
        OWN | {"id": None, "audio": "c.wav", "choices": ["cat", "cat", "dog"], "task": "music"},
        OWN | {"id": None, "answer": "bird"},
        OWN | {"audio": "text.wav"},
        OWN | {"audio": "gone.wav"},
        OWN | {"choices": []},
        {key: value for key, value in OWN.items() if key != "answer"},
    ]
    with pytest.raises(SystemExit) as status:
        prepare_data.check(write(tmp_path / "rows.jsonl", rows))
    out = capsys.readouterr().out
    assert status.value.code == 1
    for line, says in (
        (4, "answer 'bird' is not among the options"),
        (5, r".*text.wav: cannot be read"),
        (6, r".*gone.wav: no such audio file"),
        (7, "no list of"),
    ):
        assert re.search(rf"unusable: .*rows.jsonl:{line}: {says}", out)
    assert out.count("unusable: ") == 4
    assert re.search(
        r"odd: .*:1: id 1 is there 2 times\nodd: .*:2: id 1 is there 2 times\nodd: .*:3: an option stands",
        out,
    )
    assert "8 rows, 4 of them unusable, 3 remarks" in out
    assert "shortest 1.0 s, median 1.5, longest 31.0; 1 pass 30 s" in out
    assert "Hz: 8000: 1, 16000: 2, 48000: 1" in out and "channels: 1: 2, 2: 1, 6: 1" in out
    assert (
        "options: 2: 6, 3: 1" in out
        and "task: None: 4, music: 2, sound: 1" in out
        and "no answer: 1 rows" in out
    )


def test_check_finds_nothing_wrong_with_the_toy(folder):
    prepare_data.check(str(folder / "train.jsonl"), decode=True)  # would exit otherwise


def test_check_reads_whole_clips_only_when_told(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", np.where(tone() > 0.4, np.nan, tone()), 16_000, subtype="FLOAT")
    path = write(tmp_path / "rows.jsonl", [OWN])
    prepare_data.check(path)
    with pytest.raises(SystemExit):
        prepare_data.check(path, decode=True)
    assert "not finite numbers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, status, says",
    [
        (["check", "rows.jsonl", "--decode"], 0, "1 rows, 0 of them unusable"),
        (["check", "nowhere.jsonl"], 1, "error: nowhere.jsonl: cannot be read"),
        (["avqa", "rows.jsonl", "--audio_dir", "."], 2, "--output"),
        (["convert"], 2, "invalid choice"),
        (["check", "--help"], 0, "--decode"),
    ],
)
def test_commands(tmp_path, words, status, says):
    soundfile.write(tmp_path / "a.wav", tone(), 16_000)
    write(tmp_path / "rows.jsonl", [OWN])
    command = [sys.executable, ROOT / "prepare_data.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status and says in done.stdout + done.stderr and "Traceback" not in done.stderr
