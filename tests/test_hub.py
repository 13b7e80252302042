"""`prepare_data hub`: datasets from the hub, parquet, arrow and JSON Lines become questions and clips."""

import hashlib
import io
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import load_examples, write

from data import BadInput, check_audio
from tools.prepare_data import convert_row, hub


def sound(extension, pitch=440):
    """The content of a one-second audio file."""
    wave = 0.5 * np.sin(2 * np.pi * pitch * np.arange(16_000) / 16_000)
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format=extension.upper())
    return file.getvalue()


WAV, FLAC, MP3 = sound("wav"), sound("flac"), sound("mp3")


def clip_name(content, extension):
    return f"clips/{hashlib.sha256(content).hexdigest()[:32]}.{extension}"


def embedded(content, path="x.wav"):
    """A clip as the `datasets` library returns it."""
    return {"bytes": content, "path": path}


def asked(question, choices, answer, **columns):
    return {"question": question, "choices": choices, "answer": answer, **columns}


def numbered_rows(count):
    clips = [embedded(sound("wav", 300 + number)) for number in range(count)]
    return [asked("?", ["A. dog", "B. cat"], "B", id=n, audio=clip) for n, clip in enumerate(clips)]


@pytest.fixture
def publish(monkeypatch):
    """Put rows on a stand-in for the hub, which replaces the `datasets` library.

    Returns the calls to load_dataset. stop: the row at which the user presses Ctrl-C.
    """

    def publish(rows, splits=("train",), stop=None):
        def stream(decode_audio):
            assert not decode_audio  # it would need another library, and lose the bytes
            for number, row in enumerate(rows):
                if number == stop:
                    raise KeyboardInterrupt
                yield row

        def load_dataset(*args, **flags):
            calls.append((args, flags))
            dataset = SimpleNamespace(decode=stream)
            return dataset if flags["split"] else dict.fromkeys(splits, dataset)

        calls = []
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return calls

    return publish


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def convert(name, output, **flags):
    hub(str(name), str(output), **flags)
    return read(output / "questions.jsonl")


# ---------------------------------------------------------------- known datasets

MMAU = {"id": "3fe6", "task": "sound", "difficulty": "medium", "sub-category": "Acoustic Source Inference"}
KNOWN_ROWS = [  # a row, and what becomes of it
    # gijs/avqa-processed
    (
        {"question": "What is in the video?\nChoices:\nA. a boat\nB. B. Dylan", "answer": "A. a boat"},
        asked("What is in the audio?", ["a boat", "B. Dylan"], "a boat"),
    ),
    # lmms-lab/mmau
    (
        asked("Which chord?", '["G", "A#", "D"]', "D", **MMAU),
        asked("Which chord?", ["G", "A#", "D"], "D", **MMAU),
    ),
    # ngqtrung/mmar
    (
        asked("Which?", ["A. dog", "B. cat", "C. B flat"], "C", modality="sound"),
        asked("Which?", ["dog", "cat", "B flat"], "B flat", modality="sound"),
    ),
]


def test_known_datasets(tmp_path, publish):
    clips = [(WAV, "wav"), (FLAC, "flac"), (MP3, "mp3")]
    publish([{**row, "audio": embedded(clip)} for (row, _), (clip, _) in zip(KNOWN_ROWS, clips)])
    converted = convert("some/name", tmp_path / "out", video_to_audio=True)
    for row, (_, expected), (content, extension) in zip(converted, KNOWN_ROWS, clips, strict=True):
        assert row == {"audio": clip_name(content, extension), **expected}
        assert (tmp_path / "out" / row["audio"]).read_bytes() == content
    assert not (tmp_path / "out" / "questions.left_out.jsonl").exists()
    examples = load_examples(str(tmp_path / "out" / "questions.jsonl"))  # as training reads them
    assert check_audio(examples) == 0
    assert [example.answer for example in examples] == ["a boat", "D", "B flat"]


def test_clips_beside_json_lines(tmp_path):
    clip = tmp_path / "set" / "sounds" / "ü.wav"
    clip.parent.mkdir(parents=True)
    clip.write_bytes(FLAC)
    question = asked("?", ["dog", "cat"], "cat")
    rows = [
        {"audio_path": "./sounds/ü.wav"},  # BoJack/MMAR
        {"audio_path": ["sounds/ü.wav"]},  # gamma-lab-umd/MMAU-Pro
        {"audio_path": str(clip), "audio_id": "gone.wav"},
        {"audio": "gone.wav"},
        {"audio": "a\0b"},
        {"audio_path": ["sounds/ü.wav", "sounds/ü.wav"]},
    ]
    source = write(tmp_path / "set" / "rows.jsonl", [question | row for row in rows])
    expected = [{"audio": clip_name(FLAC, "flac"), **question, **row} for row in rows[:3]]
    assert convert(source, tmp_path / "out") == expected
    left_out = read(tmp_path / "out" / "questions.left_out.jsonl")
    reasons = [f"{source}:4: {tmp_path}/set/gone.wav: no such audio file", f"{source}:5: ", f"{source}:6: "]
    for entry, reason in zip(left_out, reasons, strict=True):
        assert entry["reason"].startswith(reason)


# ---------------------------------------------------------------- questions, options and answers

NONE = "is not among the options"
ANSWERS = [  # options, an answer, and what they become or why they are refused
    (["dog", "cat"], "cat", (["dog", "cat"], "cat")),
    (["dog", "cat"], "B", (["dog", "cat"], "cat")),
    (["dog", "cat"], "(b)", (["dog", "cat"], "cat")),
    (["dog", "cat"], "B. cat", (["dog", "cat"], "cat")),
    (["dog", "cat"], 1, (["dog", "cat"], "cat")),
    (["dog", "cat"], None, (["dog", "cat"], None)),
    (["dog", "cat"], "", (["dog", "cat"], None)),  # MMAU's Test
    ('["dog", "cat"]', "B", (["dog", "cat"], "cat")),
    (["(a) dog", "(b) cat"], "(b) cat", (["dog", "cat"], "cat")),
    (["A) dog", "B: cat"], "dog", (["dog", "cat"], "dog")),
    (["A.dog", "B.cat"], "A.", (["dog", "cat"], "dog")),
    (["A. cat", "B. cat", "C. dog"], "B", (["cat", "cat", "dog"], "cat")),
    (["A dog", "B flat"], "B flat", (["A dog", "B flat"], "B flat")),  # articles and notes are not letters
    (["G", "A#", "D", "E"], "D", (["G", "A#", "D", "E"], "D")),  # text takes precedence over a letter
    (["A", "B", "C"], "B", (["A", "B", "C"], "B")),
    (["A.M.", "P.M."], "P.M.", (["A.M.", "P.M."], "P.M.")),
    (["B. cat", "A. dog"], "A. dog", (["B. cat", "A. dog"], "A. dog")),
    (["A. dog", "cat"], "cat", (["A. dog", "cat"], "cat")),
    (["Ω", "日本語 🐕"], "日本語 🐕", (["Ω", "日本語 🐕"], "日本語 🐕")),
    ([" dog", "cat "], "dog", ([" dog", "cat "], "dog")),
    ([2, 3, 4], "3", (["2", "3", "4"], "3")),
    (["e", "a"], "a", (["e", "a"], "a")),
    (["e", "a"], "A", r"answer 'A' could be any of \['a', 'e'\]"),
    (["2", "3", "4"], 2, r"answer 2 could be any of \['2', '4'\]"),
    (["A. B", "B. A"], "B", r"answer 'B' could be any of \['A', 'B'\]"),
    (["B. cat", "A. dog"], "A", NONE),  # letters out of order
    (["A. dog", "cat"], "B", NONE),
    (["A. dog", "B. cat"], "C", NONE),  # past the options
    (["A. dog", "B. cat"], "B. dog", NONE),
    (["dog", "cat"], 2, NONE),
    (["dog", "cat"], -1, NONE),
    (["dog", "cat"], 1.0, NONE),
    (["dog", "cat"], True, NONE),
    (["dog"], "dog", "no list of at least two options"),
    ("dog, cat", "dog", "no list of at least two options"),
]


@pytest.mark.parametrize("choices, answer, expected", ANSWERS)
def test_options_and_answers(choices, answer, expected):
    row = asked("Which?", choices, answer)
    if isinstance(expected, str):
        with pytest.raises(BadInput, match=expected):
            convert_row(row, False)
    else:
        assert convert_row(row, False) == asked("Which?", *expected)


@pytest.mark.parametrize(
    "question, is_split",
    [
        ("Which?\nChoices:\nA. dog\nB. cat", True),
        ("Which?\n\nOptions:\n(a) dog\n(b) cat\n", True),
        ("Which?\nChoices:\nA. dog\n\nB. cat", False),  # an empty line is not an option
        ("Which?\nChoices:\nA. dog\nC. cat", False),
        ("Which?\nChoices:\ndog\ncat", False),
        ("Which?\nChoices:\nA. dog\nB. cat\nChoices:\nA. dog\nB. cat", False),
        (" ", False),
    ],
)
def test_options_below_the_question(question, is_split):
    if is_split:
        assert convert_row({"question": question}, False) == asked("Which?", ["dog", "cat"], None)
        kept = convert_row(asked(question, ["x", "y"], "x"), False)  # it has options already
        assert kept == asked(question, ["x", "y"], "x")
    else:
        with pytest.raises(BadInput, match="no list of at least two options|no question"):
            convert_row({"question": question}, False)


def test_columns_under_other_names_are_replaced():
    question = "What is in the video?"
    avqa = {"question_text": question, "multi_choice": ["dog", "cat"], "answer": 1, "video_id": 3}
    expected = asked(question, ["dog", "cat"], "cat", video_id=3)
    assert convert_row(avqa, False) == expected
    assert convert_row(avqa | expected, False) == expected
    assert convert_row({"question": "", "choices": [], **avqa}, False) == expected
    assert convert_row({"question": question, "options": ["dog", "cat"], "answer": "B"}, True) == (
        asked("What is in the audio?", ["dog", "cat"], "cat")
    )


@pytest.mark.parametrize(
    "indices, converted",
    [([1, 2, 3], None), ([1, 2, 2], ["cat", "cow", "cow"]), ([0, 2, 3], ["dog", "cow"])],
)
def test_indices_from_one_are_refused(tmp_path, publish, indices, converted):
    rows = [asked("?", ["dog", "cat", "cow"], index, audio=embedded(WAV)) for index in indices]
    publish(rows)
    if converted:
        assert [row["answer"] for row in convert("some/name", tmp_path / "out")] == converted
    else:
        with pytest.raises(BadInput, match="some/name: the answers look like 1-based indices; use 0-based"):
            convert("some/name", tmp_path / "out")
        assert not list((tmp_path / "out").glob("*.jsonl"))


# ---------------------------------------------------------------- clips


def test_unusual_clips(tmp_path, publish):
    """Names cannot escape the folder, the extension matches the content, identical clips share one file."""
    other = sound("wavex")
    usable = [
        ({"audio": embedded(WAV, "../../../evil.wav")}, clip_name(WAV, "wav")),
        ({"audio": embedded(WAV, "a/b\\c\0.wav")}, clip_name(WAV, "wav")),
        ({"audio": embedded(WAV, None), "audio_path": "gone.wav"}, clip_name(WAV, "wav")),
        ({"sound": [embedded(WAV)]}, clip_name(WAV, "wav")),
        ({"audio": embedded(WAV), "date": np.datetime64("2026-11-22"), "more": {}}, clip_name(WAV, "wav")),
        ({"audio": embedded(other, "same.wav")}, clip_name(other, "wav")),
        ({"audio": embedded(MP3, "same.wav")}, clip_name(MP3, "mp3")),  # MMAU has such names
    ]
    refused = [
        ({"audio": embedded(b"not a sound")}, "x.wav: cannot be read as audio (Format not recognised.)"),
        ({"audio": embedded(WAV[: len(WAV) // 2])}, "x.wav: is cut short"),
        ({"audio": embedded(WAV), "audio_2": embedded(FLAC)}, "has 2 clips (audio, audio_2), not one"),
        ({"audio": embedded(b"", " ")}, "the clip is empty (column audio)"),
        ({"audio": None}, "has 0 clips (no audio column), not one"),
        ({"sound": "x.wav"}, "has 0 clips (no audio column), not one"),
        ({"audio": embedded(None)}, "x.wav is a separate file in the repository: `hf download` the"),
    ]
    rows = [asked("?", ["dog", "cat"], "cat") | clip for clip, _ in usable + refused]
    publish([*rows, [1]])
    converted = convert("some/name", tmp_path / "in" / "out")

    assert [row["audio"] for row in converted] == [path for _, path in usable]
    assert converted[2]["audio_path"] == "gone.wav"
    assert "sound" not in converted[3]
    assert (converted[4]["date"], converted[4]["more"]) == ("2026-11-22", {})
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    expected = {f"in/out/{path}" for _, path in usable}
    expected |= {"in/out/questions.jsonl", "in/out/questions.left_out.jsonl"}
    assert written - {"in/out/.lock"} == expected

    left_out = read(tmp_path / "in" / "out" / "questions.left_out.jsonl")
    reasons = [reason for _, reason in refused] + ["not a JSON object"]
    for number, (entry, reason) in enumerate(zip(left_out, reasons, strict=True), len(usable) + 1):
        assert entry["reason"].startswith(f"some/name: row {number}: {reason}")
    assert left_out[0]["row"]["audio"] == {"bytes": "<11 bytes>", "path": "x.wav"}


# ---------------------------------------------------------------- the command


def test_split_limit_and_the_rows_shown(tmp_path, publish, capsys):
    calls = publish(numbered_rows(5))
    rows = convert("TwinkStart/MMAU", tmp_path / "out", split="v05.15.25", limit=4)
    assert calls == [(("TwinkStart/MMAU",), {"split": "v05.15.25", "streaming": True})]
    assert [row["id"] for row in rows] == [0, 1, 2, 3]
    out = capsys.readouterr().out
    for number, is_shown in ((1, True), (2, True), (3, True), (4, False)):
        assert (f"row {number}: {{'audio': 'clips/" in out) == is_shown
    assert "'question': '?', 'choices': ['dog', 'cat'], 'answer': 'cat'}\n" in out
    assert f"4 rows: 4 in {tmp_path / 'out' / 'questions.jsonl'}, 0 unusable" in out


def test_an_interrupted_call_is_repeated_without_writing_clips_again(tmp_path, publish):
    rows = numbered_rows(6)
    publish(rows, stop=4)
    with pytest.raises(KeyboardInterrupt):
        convert("some/name", tmp_path / "out")
    clips = list((tmp_path / "out" / "clips").iterdir())
    assert len(clips) == 4 and not list((tmp_path / "out").glob("*.jsonl"))
    times = {path: path.stat().st_mtime_ns for path in clips}

    publish(rows)
    assert [row["id"] for row in convert("some/name", tmp_path / "out")] == list(range(6))
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert len(os.listdir(tmp_path / "out" / "clips")) == 6
    with pytest.raises(BadInput, match="questions.jsonl: already exists"):
        convert("some/name", tmp_path / "out")


def test_what_cannot_be_converted_leaves_no_questions(tmp_path, publish, monkeypatch):
    jsonl = write(tmp_path / "a.jsonl", [{"a": 1}])
    csv = write(tmp_path / "a.csv", [])

    def refuse(message, name="some/name", **flags):
        with pytest.raises(BadInput, match=message):
            convert(name, tmp_path / "out", **flags)
        assert not list((tmp_path / "out").glob("*.jsonl"))

    publish([{"question": "?"}])
    refuse("some/name: none of 1 rows can be used; the first: some/name: row 1: no list")
    publish([])
    refuse("some/name: none of 0 rows can be used$")
    publish(numbered_rows(1), splits=("train", "test"))
    refuse("some/name: has the splits train, test: choose one with --split")
    refuse("--split test applies to a dataset or a folder, but .*a.jsonl is a file", jsonl, split="test")
    refuse("a.csv: only .parquet, .arrow, .json and .jsonl files are read", csv)
    monkeypatch.setitem(sys.modules, "datasets", None)
    refuse("`pip install datasets` first")


def test_a_clip_that_cannot_be_written_is_not_taken_for_a_bad_row(tmp_path, publish):
    (row,) = numbered_rows(1)
    clip = clip_name(row["audio"]["bytes"], "wav")
    (tmp_path / "out" / f"{clip}.partial").mkdir(parents=True)  # blocks the write, as a full disk would
    publish([row])
    with pytest.raises(BadInput, match=f"{clip}: cannot be written"):
        convert("some/name", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.jsonl"))


# ---------------------------------------------------------------- with the library itself


def assert_converted(name, output, count, split=""):
    converted = convert(name, output, split=split)
    assert [row["id"] for row in converted] == list(range(count))
    assert len(os.listdir(output / "clips")) == count


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = numbered_rows(7)
    folder = tmp_path / "set"
    datasets.Dataset.from_list(rows[:4]).to_parquet(folder / "dev-0.parquet")
    datasets.Dataset.from_list(rows[4:]).to_parquet(folder / "dev-1.parquet")
    assert_converted(folder / "dev-0.parquet", tmp_path / "file", 4)
    assert_converted(folder, tmp_path / "folder", 7)
    assert_converted(folder, tmp_path / "split", 7, split="validation")  # what the library calls dev
    with pytest.raises(BadInput, match="Available splits"):
        convert(folder, tmp_path / "other", split="train")


def test_arrow_and_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(numbered_rows(3))
    # an audio column as the library has it; in two steps, so that no clip is decoded
    saved = saved.cast_column("audio", datasets.Audio(decode=False)).cast_column("audio", datasets.Audio())
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"dev": saved}).save_to_disk(tmp_path / "several")
    (file,) = (tmp_path / "one").glob("*.arrow")
    assert_converted(file, tmp_path / "out-file", 3)
    assert_converted(tmp_path / "one", tmp_path / "out-one", 3)
    assert_converted(tmp_path / "several", tmp_path / "out-several", 3, split="dev")
