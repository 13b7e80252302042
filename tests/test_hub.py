"""`prepare_data.py hub`: rows as the hub has them, with real sound, to rows that train and evaluate."""

import hashlib
import inspect
import io
import json
import os
import re
import runpy
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import ROOT, load_examples, metrics, run_script, write

import evaluate
import prepare_data
from data import BadInput


def sound(kind, pitch=440):
    wave = 0.5 * np.sin(2 * np.pi * pitch * np.arange(16_000) / 16_000)
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format=kind.upper())
    return file.getvalue()


WAV, FLAC, MP3 = CLIPS = sound("wav"), sound("flac"), sound("mp3")


def path_of(content, kind):
    return f"clips/{hashlib.sha256(content).hexdigest()[:32]}.{kind}"


AUDIO = [{"audio": path_of(content, kind)} for content, kind in zip(CLIPS, ("wav", "flac", "mp3"))]


def cell(content, path=None):
    return {"bytes": content, "path": path}


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """No test may reach for the network."""
    tried = []

    def refuse(_, address):
        tried.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not tried


class StandIn:
    """What `datasets.load_dataset(..., streaming=True)` gives, without the library."""

    def __init__(self, rows, stop=None):
        self.rows, self.stop, self.next, self.decodes = rows, stop, 0, True

    def decode(self, enable):
        self.decodes = enable
        return self

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]

    def __iter__(self):
        assert not self.decodes  # would need torchcodec, and change the bytes
        while self.next < len(self.rows):
            if self.next == self.stop:
                raise KeyboardInterrupt
            self.next += 1
            yield self.rows[self.next - 1]


@pytest.fixture
def serve(monkeypatch):
    """Puts a data set on the hub; the list of calls of the loader."""
    calls = []

    def serve(found):
        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            return found

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return calls

    return serve


def convert(name, output, **flags):
    prepare_data.hub(str(name), output=str(output), **flags)
    return read(output / "questions.jsonl")


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


# ---------------------------------------------------------------- the data sets

MMAU_COLUMNS = {"id": "3fe6", "dataset": "AudioSet", "task": "sound", "split": "test-mini"}
MMAU_COLUMNS |= {"category": "Reasoning", "sub-category": "Acoustic Source Inference", "difficulty": "medium"}


def asked(question, choices, answer, **more):
    return {"question": question, "choices": choices, "answer": answer} | more


# rows as they are, "@" for a clip inside; what they must become, but for the clip
AVQA = (
    [
        {"question": "What happened in the video?\nChoices:\nA. motorboat\nB. yacht\nC. A sailboat\nD. 3",
         "answer": "B. yacht", "audio": "@"},
        {"question": "How many animals are there in the video?\nChoices:\nA. 3\nB. One\nC. 4\nD. 2",
         "answer": "A. 3", "audio": "@"},
        {"question": "Where is it?\nChoices:\nA. B. Dylan's\nB. At sea", "answer": "B. At sea", "audio": "@"},
    ],
    [
        asked("What happened in the audio?", ["motorboat", "yacht", "A sailboat", "3"], "yacht"),
        asked("How many animals are there in the audio?", ["3", "One", "4", "2"], "3"),
        asked("Where is it?", ["B. Dylan's", "At sea"], "At sea"),
    ],
)  # fmt: skip
AUDIOMCQ = [
    asked("Which sound is last?", ["A dog", "rain", "a bell", "wind"], "A dog", source_dataset="Clotho", id=n,
          question_type="sound", audio_path=f"Clotho/{n}.{kind}", gemini_cot="<think>…</think>")
    for n, kind in enumerate(("wav", "flac", "mp3"))
]  # fmt: skip
LMMS = [
    MMAU_COLUMNS
    | {"question": "Which chord?", "choices": json.dumps(choices), "answer": answer, "audio": "@"}
    for choices, answer in ((["G", "A#", "D", "E"], "D"), (["Man", "Woman"], "Man"), (["x", "x", "ü"], "x"))
]
TWINKSTART = [
    MMAU_COLUMNS | asked("Who speaks?", ["Man", "Woman", "Child", "Robot"], answer, audio="@")
    for answer in ("Man", "Woman", "Robot")
]
MMAR = [
    asked("What is it?", ["Yes", "No"], "No", id=f"x_{n}", modality="mix-sound-music", language="en",
          audio_path=f"./audio/{n}.{kind}")
    for n, kind in enumerate(("wav", "flac", "mp3"))
]  # fmt: skip
NGQTRUNG = [
    asked("Which one?", ["A. dog", "B. cat", "C. B flat"], answer, modality="sound", audio="@")
    for answer in ("C", "A", "B")
]
MMAU_PRO = [
    asked("Which one?", ["dog", "cat"], "cat", id=str(n), audio_path=[f"data/{n}.{kind}"], category="sound")
    for n, kind in enumerate(("wav", "flac", "mp3"))
]
MMAU_PRO += [
    MMAU_PRO[0] | {"audio_path": ["data/0.wav", "data/1.flac"]},
    MMAU_PRO[0] | {"choices": []},
]

DATA_SETS = {  # rows, what they become, reasons of those that cannot be used
    "gijs/avqa-processed": (*AVQA, []),
    "Harland/AudioMCQ-StrongAC-GeminiCoT": (AUDIOMCQ, AUDIOMCQ, []),
    "lmms-lab/mmau": (LMMS, [row | {"choices": json.loads(row["choices"])} for row in LMMS], []),
    "TwinkStart/MMAU": (TWINKSTART, TWINKSTART, []),
    "BoJack/MMAR": (MMAR, MMAR, []),
    "ngqtrung/mmar": (
        NGQTRUNG,
        [row | {"choices": ["dog", "cat", "B flat"], "answer": answer}
         for row, answer in zip(NGQTRUNG, ("B flat", "dog", "cat"))],
        [],
    ),
    "gamma-lab-umd/MMAU-Pro": (
        MMAU_PRO,
        MMAU_PRO[:3],
        ["2 clips (audio_path), not one", "no list of at least two options (key 'choices')"],
    ),
}  # fmt: skip


def source(name, tmp_path, serve, real):
    """The data set on the stand-in's hub or, with the sound beside it, as JSON Lines; real: as parquet."""
    rows = DATA_SETS[name][0]
    for row in rows:
        paths = row.get("audio_path", [])
        for path in [paths] if isinstance(paths, str) else paths:
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes(CLIPS[int(path[-5] if path[-4] == "." else path[-6])])
    inside = "audio" in rows[0]
    if inside:
        rows = [row | {"audio": cell(content, "x.wav")} for row, content in zip(rows, CLIPS)]
    if real:
        return write_table(tmp_path / "rows.parquet", rows)
    if inside:
        serve({"train": StandIn(rows)})
        return name
    return write(tmp_path / "rows.jsonl", rows)


def write_table(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return str(path)


@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "datasets"])
@pytest.mark.parametrize("name", DATA_SETS)
def test_a_data_set_becomes_rows_and_clips(tmp_path, serve, name, real):
    _, expected, reasons = DATA_SETS[name]
    flags = {"video_to_audio": True} if "avqa" in name else {}
    rows = convert(source(name, tmp_path, serve, real), tmp_path / "out", **flags)
    # an exact comparison of whole rows: each column is there, and none besides
    assert rows == [row | audio for row, audio in zip(expected, AUDIO, strict=True)]
    for row, content in zip(rows, CLIPS):
        assert (tmp_path / "out" / row["audio"]).read_bytes() == content
    assert len(os.listdir(tmp_path / "out" / "clips")) == 3
    left_out = tmp_path / "out" / "questions.left_out.jsonl"
    assert left_out.exists() == bool(reasons)
    lost = read(left_out) if reasons else []
    for entry, reason, row in zip(lost, reasons, DATA_SETS[name][0][3:], strict=True):
        assert entry["row"] == row and entry["reason"].endswith(reason) and "rows." in entry["reason"]
    assert not (tmp_path / "out" / "progress.jsonl").exists()


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_converted_file_trains_and_evaluates(folder, tmp_path, monkeypatch, serve, name):
    rows = convert(source(name, tmp_path, serve, real=False), tmp_path / "out")
    data = tmp_path / "out" / "questions.jsonl"
    run_script("train_grpo", folder, tmp_path / "run", data=str(data), group_size=2)
    assert [line["step"] for line in metrics(tmp_path / "run")][:2] == [0, 1]
    flags = [
        "--model",
        folder / "model",
        "--data",
        data,
        "--output",
        tmp_path / "eval",
        "--max_new_tokens",
        4,
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    evaluate.main()
    predictions = json.load(open(tmp_path / "eval" / "predictions.json"))
    for row, prediction in zip(rows, predictions, strict=True):
        assert (
            row.items() <= prediction.items()
        )  # id, task, difficulty, sub-category: what MMAU's script reads
        assert isinstance(prediction["model_output"], str) and isinstance(prediction["model_prediction"], str)
    results = json.load(open(tmp_path / "eval" / "results.json"))
    assert (results["total"], results["unreadable"]) == (3, [])
    if "task" in rows[0]:
        assert {key: list(results["by"][key]) for key in ("task", "difficulty", "sub-category")} == {
            "task": ["sound"], "difficulty": ["medium"], "sub-category": ["Acoustic Source Inference"],
        }  # fmt: skip


# ---------------------------------------------------------------- rows of every kind


@pytest.mark.parametrize(
    "choices, answer, expected",
    [
        (["dog", "cat"], "cat", (["dog", "cat"], "cat")),
        (["dog", "cat"], "B", (["dog", "cat"], "cat")),
        (["dog", "cat"], "(b)", (["dog", "cat"], "cat")),
        (["dog", "cat"], "B. cat", (["dog", "cat"], "cat")),
        (["dog", "cat"], 1, (["dog", "cat"], "cat")),
        (["(a) dog", "(b) cat"], "(b) cat", (["dog", "cat"], "cat")),
        (["(a) dog", "(b) cat"], "b", (["dog", "cat"], "cat")),
        (["A) dog", "B: cat"], "dog", (["dog", "cat"], "dog")),
        (["A.dog", "B.cat"], "A.", (["dog", "cat"], "dog")),
        (["A. cat", "B. cat", "C. dog"], "B", (["cat", "cat", "dog"], "cat")),  # a repeated option
        (["A. A dog", "B. B flat"], "B", (["A dog", "B flat"], "B flat")),
        (["A dog", "B flat"], "B flat", (["A dog", "B flat"], "B flat")),
        (["A dog", "B flat"], "B", (["A dog", "B flat"], "B flat")),
        (["B flat", "A dog"], "A dog", (["B flat", "A dog"], "A dog")),
        (["G", "A#", "D", "E"], "D", (["G", "A#", "D", "E"], "D")),  # notes: MMAU has such rows
        (["A", "B", "C"], "B", (["A", "B", "C"], "B")),
        (["A.M.", "P.M."], "P.M.", (["A.M.", "P.M."], "P.M.")),
        (["B. cat", "A. dog"], "A. dog", (["B. cat", "A. dog"], "A. dog")),  # its text, whatever letters mean
        (["A. dog", "cat"], "cat", (["A. dog", "cat"], "cat")),
        (["dog", "B. cat"], "B. cat", (["dog", "B. cat"], "B. cat")),
        (["Ω", "日本語 🐕"], "日本語 🐕", (["Ω", "日本語 🐕"], "日本語 🐕")),
        ([" dog", "cat "], "dog", ([" dog", "cat "], "dog")),
        ([True, "no"], "no", "option 1 is not text"),
        ([2, 3, 4], "3", (["2", "3", "4"], "3")),
        (["dog", "cat"], None, (["dog", "cat"], None)),  # MMAU's Test
        (["dog", "cat"], "", (["dog", "cat"], None)),
        (["B. cat", "A. dog"], "A", "answer 'A' is none of the options"),  # letters out of order
        (["B. cat", "A. dog"], "dog", "answer 'dog' is none of the options"),
        (["A. dog", "cat"], "B", "answer 'B' is none of the options"),
        (["A. dog", "B. cat"], "C", "answer 'C' is none of the options"),  # past the options
        (["dog", "cat"], "E", "answer 'E' is none of the options"),
        (["A. dog", "B. cat"], "B. dog", "answer 'B. dog' is none of the options"),
        (["A. B", "B. A"], "B", "answer 'B' could be any of \\['A', 'B'\\]"),
        (["2", "3", "4"], 1, (["2", "3", "4"], "3")),
        (["e", "a"], "A", "answer 'A' could be any of \\['a', 'e'\\]"),
        (["e", "a"], "a", (["e", "a"], "a")),
        (["2", "3", "4"], 2, "answer 2 could be any of \\['2', '4'\\]"),
        (["dog", "cat"], 2, "answer 2 is none of the options"),
        (["dog", "cat"], -1, "answer -1 is none of the options"),
        (["dog", "cat"], 1.0, "answer 1.0 is none of the options"),
        (["dog", "cat"], True, "answer True is none of the options"),
        (["dog", "cat"], ["cat"], "is none of the options"),
        (["dog", "cat"], "a dog", "answer 'a dog' is none of the options"),
        (["dog", ""], "dog", "option 2 is not text"),
        (["dog", None], "dog", "option 2 is not text"),
        (["dog"], "dog", "no list of at least two options"),
        (None, "dog", "no list of at least two options"),
        ("dog, cat", "dog", "no list of at least two options"),
        ('["dog", "cat"]', "B", (["dog", "cat"], "cat")),
        ("[]", "B", "no list of at least two options"),
        (["<|AUDIO|>", "cat"], "cat", "special token"),
        (["\ud800", "cat"], "cat", "UnicodeEncodeError"),
    ],
)  # fmt: skip
def test_options_and_answers(choices, answer, expected):
    row = {"question": "Which?", "choices": choices, "answer": answer}
    if isinstance(expected, str):
        with pytest.raises(Exception, match=expected):
            with prepare_data.blame("here"):
                prepare_data.to_own_format(row, False)
    else:
        own = prepare_data.to_own_format(row, False)
        assert (own["choices"], own["answer"]) == expected and own["question"] == "Which?"


@pytest.mark.parametrize("answers, refused", [([1, 2, 3], True), ([1, 2, 2], False), ([0, 2, 3], False)])
def test_indices_from_one_are_refused(tmp_path, serve, answers, refused):
    serve(
        {
            "train": StandIn(
                [{"audio": cell(WAV)} | asked("?", ["a dog", "a cat", "a cow"], n) for n in answers]
            )
        }
    )
    if refused:
        with pytest.raises(
            BadInput, match="some/name: its answers seem to be indices from 1; write them from 0"
        ):
            convert("some/name", tmp_path / "out")
        assert not list((tmp_path / "out").glob("*.jsonl"))
    else:
        names = ["a dog", "a cat", "a cow"]
        converted = convert("some/name", tmp_path / "out")
        assert [row["answer"] for row in converted] == [names[n] for n in answers if n < 3]


@pytest.mark.parametrize(
    "question, choices, expected",
    [
        ("Which?\nChoices:\nA. dog\nB. cat", None, ("Which?", ["dog", "cat"])),
        ("Which?\nChoices:\nA. dog\nB. cat\n", [], ("Which?", ["dog", "cat"])),
        ("Two\nlines?\n\nOptions:\n(a) dog\n\n(b) cat", None, None),  # an empty line is no option
        ("Which?\nChoices:\n(a) dog\n(b) cat", None, ("Which?", ["dog", "cat"])),
        ("Which?\nChoices:\nA. dog\nC. cat", None, None),
        ("Which?\nChoices:\ndog\ncat", None, None),
        ("Which?\nChoices:\nA. dog\nwith a tail\nB. cat", None, None),
        ("Which?\nChoices:\nA. x\nB. y\nChoices:\nA. dog\nB. cat", None, None),
        ("Which Choices: A. dog B. cat", None, None),
        ("Which?\nChoices:\nA. dog\nB. cat", ["x", "y"], ("Which?\nChoices:\nA. dog\nB. cat", ["x", "y"])),
        (" ", ["x", "y"], None),
        (7, ["x", "y"], None),
    ],
)
def test_options_in_the_question(question, choices, expected):
    row = {"question": question, "choices": choices, "more": 1}
    if expected is None:
        with pytest.raises(BadInput, match="no list of at least two options|no question"):
            prepare_data.to_own_format(row, False)
    else:
        own = prepare_data.to_own_format(row, False)
        assert own == {"question": expected[0], "choices": expected[1], "answer": None, "more": 1}


def test_columns_of_the_original_avqa_do_not_stay_beside_ours():
    row = {
        "question_text": "What is in the video?",
        "multi_choice": ["dog", "cat"],
        "answer": 1,
        "video_id": 3,
    }
    own = {"question": "What is in the video?", "choices": ["dog", "cat"], "answer": "cat", "video_id": 3}
    assert prepare_data.to_own_format(row, False) == own
    assert prepare_data.to_own_format(row | own, False) == own
    assert prepare_data.to_own_format(row, True) == own | {"question": "What is in the audio?"}


def test_nasty_clips_are_written_safely_or_refused(tmp_path, serve):
    """Names lead nowhere, the same sound is one file, and bytes that are no sound are not written."""
    good = [
        {"audio": cell(WAV, "../../../evil.wav")},
        {"audio": cell(WAV, "/etc/passwd")},
        {"audio": cell(WAV, "a/b\\c\0.wav")},
        {"audio": cell(WAV, "日本語 🐕.wav")},
        {"audio": cell(WAV, None), "audio_path": "gone.wav"},
        {"audio": [cell(WAV, "x")]},
        {"sound": cell(WAV, "x"), "when": np.datetime64("2026-11-22")},
        {"audio": cell(sound("wav", 500), "same.wav")},
        {"audio": cell(MP3, "same.wav")},  # MP3 named .wav: MMAU has 46
    ]
    bad = {
        "x.wav: cannot be read as audio": {"audio": cell(b"not a sound", "x.wav")},
        "the clip: cannot be read as audio": {"audio": cell(b"RIFF", None)},
        "x.wav: is cut short": {"audio": cell(WAV[: len(WAV) // 2], "x.wav")},
        "2 clips (audio)": {"audio": [cell(WAV), cell(FLAC)]},
        "2 clips (audio, audio_2)": {"audio": cell(WAV), "audio_2": cell(FLAC)},
        "an empty clip (audio)": {"audio": cell(None, None)},
        "an empty clip (audio": {"audio": cell(b"", " ")},
        "0 clips (no column audio)": {"audio": None},
        "0 clips (no column audio) ": {"audio": []},
        "x.wav lies beside the rows in the repository: `hf download`": {"audio": cell(None, "x.wav")},
        "0 clips (no column audio)  ": {"sound": "x.wav"},
    }
    rows = [asked("?", ["dog", "cat"], "cat") | row for row in [*good, *bad.values()]]
    serve({"train": StandIn(rows)})
    converted = convert("some/name", tmp_path / "in" / "out")
    files = [path_of(WAV, "wav")] * 7 + [path_of(sound("wav", 500), "wav"), path_of(MP3, "mp3")]
    assert [row["audio"] for row in converted] == files
    assert converted[4]["audio_path"] == "gone.wav" and "sound" not in converted[6]
    assert converted[6]["when"] == "2026-11-22"
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert [p for p in written if "clips" in p] == sorted(f"in/out/{file}" for file in set(files))
    assert {p for p in written if "clips" not in p} <= {
        "in/out/questions.jsonl", "in/out/questions.left_out.jsonl", "in/out/.lock",
    }  # fmt: skip
    lost = read(tmp_path / "in" / "out" / "questions.left_out.jsonl")
    for n, (entry, reason) in enumerate(zip(lost, bad, strict=True), len(good) + 1):
        assert entry["reason"].startswith(f"some/name: row {n}: ") and reason.strip() in entry["reason"]
    assert lost[0]["row"]["audio"] == {"bytes": "<11 bytes>", "path": "x.wav"}


def test_clips_beside_json_lines(tmp_path):
    (tmp_path / "set" / "sounds").mkdir(parents=True)
    (tmp_path / "set" / "sounds" / "ü.wav").write_bytes(FLAC)
    rows = [
        {"audio": path} for path in ("sounds/ü.wav", str(tmp_path / "set/sounds/ü.wav"), "gone.wav", "a\0b")
    ]
    path = write(tmp_path / "set" / "rows.jsonl", [asked("?", ["dog", "cat"], "cat") | row for row in rows])
    with open(path, "a") as file:
        file.write("[1]\n")
    assert [row["audio"] for row in convert(path, tmp_path / "out")] == 2 * [path_of(FLAC, "flac")]
    reasons = [entry["reason"] for entry in read(tmp_path / "out" / "questions.left_out.jsonl")]
    assert [reason.split(": ")[0] for reason in reasons] == [f"{path}:{n}" for n in (3, 4, 5)]
    assert "gone.wav: no such audio file" in reasons[0] and "not a JSON object" in reasons[2]


# ---------------------------------------------------------------- the command


def some_rows(n):
    return [asked("?", ["A. dog", "B. cat"], "B", id=i, audio=cell(sound("wav", 300 + i))) for i in range(n)]


def test_the_loader_is_asked_for_what_was_named(tmp_path, serve, capsys):
    calls = serve(StandIn(some_rows(5)))
    rows = convert("TwinkStart/MMAU", tmp_path / "out", split="v05.15.25", limit="4")
    assert calls == [(("TwinkStart/MMAU",), {"split": "v05.15.25", "streaming": True})]
    assert [row["id"] for row in rows] == [0, 1, 2, 3]
    out = capsys.readouterr().out
    assert [f"row {n}: " in out for n in (1, 2, 3, 4)] == [True, True, True, False]  # three are shown
    assert "'question': '?', 'choices': ['dog', 'cat'], 'answer': 'cat'}\n" in out and "4 rows: 4 in" in out
    calls = serve({"train": StandIn([]), "test": StandIn([])})
    with pytest.raises(BadInput, match="some/name: has the splits train, test: choose one by --split"):
        convert("some/name", tmp_path / "other")
    assert calls[-1] == (("some/name",), {"split": None, "streaming": True})


def test_an_interrupted_call_goes_on(tmp_path, serve):
    rows = some_rows(9)
    rows[2]["audio"] = cell(b"not a sound", "x.wav")
    serve(StandIn(rows))
    expected = convert("some/name", tmp_path / "whole")
    serve(StandIn(rows, stop=5))
    with pytest.raises(KeyboardInterrupt):
        convert("some/name", tmp_path / "out")
    assert not (tmp_path / "out" / "questions.jsonl").exists()
    progress = tmp_path / "out" / "progress.jsonl"
    lines = progress.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    progress.write_text("".join(lines[:4]) + lines[4][:30])  # as a kill may leave it, after the clip
    clips = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "clips").iterdir()}
    assert len(clips) == 4
    with pytest.raises(BadInput, match="of a call with other flags; repeat that"):
        convert("another/name", tmp_path / "out")
    source = StandIn(rows)
    serve(source)
    starts = []
    monkey = source.load_state_dict
    source.load_state_dict = lambda state: (starts.append(state), monkey(state))
    assert convert("some/name", tmp_path / "out") == expected
    assert starts == [{"next": 4}]
    assert all(path.stat().st_mtime_ns == time for path, time in clips.items())
    lost = [read(tmp_path / part / "questions.left_out.jsonl") for part in ("whole", "out")]
    assert lost[0] == lost[1] and len(lost[0]) == 1
    with pytest.raises(BadInput, match="questions.jsonl: already there"):
        convert("some/name", tmp_path / "out")


def interrupt_at_clip(n, monkeypatch):
    """Ctrl-C when the n-th clip is read; returns the list of what was read, which goes on growing."""
    real, calls = prepare_data.clip_bytes, []

    def clip_bytes(*args):
        calls.append(args)
        if len(calls) == n:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(prepare_data, "clip_bytes", clip_bytes)
    return calls


def test_an_interrupted_call_on_json_lines_goes_on(tmp_path, monkeypatch):
    for n, content in enumerate(CLIPS):
        (tmp_path / f"{n}").write_bytes(content)
    path = write(tmp_path / "a.jsonl", [asked("?", ["x", "y"], "x", audio=f"{n % 3}", n=n) for n in range(6)])
    calls = interrupt_at_clip(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "out", limit="5")
    assert [row["n"] for row in convert(path, tmp_path / "out", limit="5")] == list(range(5))
    assert len(calls) == 4 + 2  # three rows were done


def test_what_cannot_be_converted_leaves_one_line(tmp_path, serve, monkeypatch):
    serve(StandIn([{"question": "?"}]))
    with pytest.raises(
        BadInput, match="some/name: none of 1 rows can be used; the first: some/name: row 1: no li"
    ):
        convert("some/name", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.jsonl"))
    serve(StandIn([]))
    with pytest.raises(BadInput, match="some/name: none of 0 rows can be used$"):
        convert("some/name", tmp_path / "out")
    with pytest.raises(BadInput, match="--limit must be a whole number, not -1"):
        convert("some/name", tmp_path / "out", limit="-1")
    with pytest.raises(BadInput, match="--split test is for a name or a folder"):
        convert(write(tmp_path / "a.jsonl", [{"a": 1}]), tmp_path / "out2", split="test")
    serve({"train": StandIn(some_rows(1)), "test": StandIn([])})
    with pytest.raises(BadInput, match="choose one by --split"):
        convert("some/name", tmp_path / "out")
    serve(StandIn(some_rows(1)))  # with no row read, other flags may follow
    assert len(convert("some/name", tmp_path / "out", split="train")) == 1
    (tmp_path / "out" / "questions.jsonl").unlink()
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(BadInput, match="`pip install datasets` first"):
        convert("some/name", tmp_path / "out")


def test_a_full_disk_is_not_taken_for_a_bad_row(tmp_path, serve, monkeypatch):
    def no_space(path, content):
        raise BadInput(f"{path}: cannot be written (No space left on device)")

    serve(StandIn(some_rows(3)))
    monkeypatch.setattr(prepare_data, "write_whole", no_space)
    with pytest.raises(BadInput, match="clips/.*: cannot be written"):
        convert("some/name", tmp_path / "out")


# ---------------------------------------------------------------- with the library itself


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_files_and_folders_by_the_library(tmp_path, kind):
    rows = some_rows(7)
    (tmp_path / "set" / "data").mkdir(parents=True)
    file = write_table(tmp_path / "set" / "data" / f"test_mini-00000-of-00002.{kind}", rows[:4])
    write_table(tmp_path / "set" / "data" / f"test_mini-00001-of-00002.{kind}", rows[4:])
    assert [row["id"] for row in convert(file, tmp_path / "one")] == [0, 1, 2, 3]
    for output, flags in (("folder", {}), ("split", {"split": "test_mini"})):
        assert [row["id"] for row in convert(tmp_path / "set", tmp_path / output, **flags)] == list(range(7))
    with pytest.raises(BadInput, match="Available splits"):
        convert(tmp_path / "set", tmp_path / "other", split="train")
    with pytest.raises(BadInput, match="no-such"):
        convert(tmp_path / "no-such", tmp_path / "none")


def test_a_saved_data_set_and_the_librarys_own_audio_column(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(some_rows(3))
    saved = saved.cast_column("audio", datasets.Audio(decode=False)).cast_column("audio", datasets.Audio())
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"dev": saved}).save_to_disk(tmp_path / "dict")
    assert [row["id"] for row in convert(tmp_path / "saved", tmp_path / "out")] == [0, 1, 2]
    assert [row["id"] for row in convert(tmp_path / "dict", tmp_path / "out2", split="dev")] == [0, 1, 2]


def test_an_interrupted_call_goes_on_in_the_middle_of_a_file(tmp_path, monkeypatch):
    rows = some_rows(9)
    for n in range(3):
        write_table(tmp_path / f"train-0000{n}-of-00003.parquet", rows[3 * n : 3 * n + 3])
    calls = interrupt_at_clip(6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path, tmp_path / "out")
    assert [row["id"] for row in convert(tmp_path, tmp_path / "out")] == list(range(9))
    assert len(calls) == 6 + 4


# ---------------------------------------------------------------- filter


def predictions(rows, outputs):
    return [
        row | {"model_output": o, "model_prediction": o, "completion": o} for row, o in zip(rows, outputs)
    ]


@pytest.fixture
def answered(tmp_path):
    """Five questions and a model's predictions: right, wrong, none, right (the index 0), no answer."""
    rows = [
        asked("?", ["a dog", "a cat"], "a dog", audio=f"{n}.wav", id=n, odd=float("nan")) for n in range(5)
    ]
    rows[3] = {"audio_path": "3.wav", "question_text": "?", "multi_choice": ["a dog", "a cat"], "answer": 0}
    del rows[4]["answer"]
    made = predictions(rows, ["A dog.", "a cat", "a dog", "a dog", "a dog"])
    made[2] = rows[2]
    return rows, write(tmp_path / "rows.jsonl", rows), write(tmp_path / "p.json", made, as_list=True)


def test_filter_keeps_what_a_model_got_wrong_or_right(tmp_path, capsys, answered):
    rows, file, made = answered
    for drop, kept in (("right", [1]), ("wrong", [0, 3])):
        output = tmp_path / f"{drop}.jsonl"
        prepare_data.filter(file, predictions=made, drop=drop, output=str(output))
        assert json.dumps(read(output)) == json.dumps([rows[n] for n in kept])
        out = capsys.readouterr().out
        assert "5 rows: 2 right, 1 wrong, 2 left out without an answer or a prediction" in out
        assert "--audio_dir" not in out
    (tmp_path / "sub").mkdir()
    prepare_data.filter(file, predictions=made, output=str(tmp_path / "sub" / "hard.jsonl"))
    assert f"--audio_dir {tmp_path}" in capsys.readouterr().out


def test_filter_refuses_predictions_of_another_file(tmp_path, answered):
    rows, file, made = answered

    def refuse(match, file=file, made=made, **flags):
        with pytest.raises(BadInput, match=match):
            prepare_data.filter(file, predictions=made, output=str(tmp_path / "no.jsonl"), **flags)
        assert not (tmp_path / "no.jsonl").exists()

    other = [*rows[:1], rows[1] | {"answer": "a cat"}]
    refuse("rows.jsonl:2; were", made=write(tmp_path / "o.jsonl", predictions(other, "ab")))
    refuse(r"o.jsonl:1: is not about", made=write(tmp_path / "o.jsonl", predictions(rows[1:], "ab")))
    refuse("p.json: has 5 rows, and .*two.jsonl only 2", file=write(tmp_path / "two.jsonl", rows[:2]))
    refuse(
        "none is left of 5 rows: 1 right", made=write(tmp_path / "o.jsonl", predictions(rows[:1], ["a dog"]))
    )
    refuse("none is left of 5 rows: 0 right, 0 wrong, 5 left out", made=file)
    refuse("--drop hard: unknown", drop="hard")
    (tmp_path / "no.jsonl").touch()
    with pytest.raises(BadInput, match="already there"):
        prepare_data.filter(file, predictions=made, output=str(tmp_path / "no.jsonl"))


def test_filter_takes_what_evaluate_wrote(folder, tmp_path, monkeypatch):
    """In silence, the first eight of twelve; what is left trains, from the folder of the questions."""
    flags = ["--model", folder / "model", "--data", folder / "test.jsonl", "--output", tmp_path / "eval"]
    flags += ["--max_new_tokens", 4, "--silence", "--limit", 8]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    evaluate.main()
    made, output = tmp_path / "eval" / "predictions.json", tmp_path / "hard.jsonl"
    prepare_data.filter(str(folder / "test.jsonl"), predictions=str(made), output=str(output))
    results = json.load(open(tmp_path / "eval" / "results.json"))
    examples = load_examples(str(output), str(folder))
    assert len(examples) == 8 - results["correct"] > 0
    run_script("train_grpo", folder, tmp_path / "run", data=str(output), audio_dir=str(folder), max_steps=1)


def test_commands_by_their_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(WAV)
    write(tmp_path / "rows.jsonl", [asked("?", ["A. dog", "B. cat"], "b", audio="a.wav")])
    for words, says in (
        (["hub", "rows.jsonl", "--output", "out"], "1 rows: 1 in out/questions.jsonl, 0 unusable"),
        (["check", "out/questions.jsonl"], "1 rows, 0 of them unusable"),
        (["hub", "rows.jsonl", "--output", "out"], "error: out/questions.jsonl: already there"),
        (
            ["filter", "rows.jsonl", "--predictions", "rows.jsonl", "--output", "x"],
            "error: rows.jsonl: none is",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *words])
        try:
            runpy.run_path(str(ROOT / "prepare_data.py"), run_name="__main__")
        except SystemExit as end:
            print(end)
        assert says in capsys.readouterr().out


def test_the_readmes_commands_have_flags_that_exist():
    commands = re.findall(
        r"^    python prepare_data\.py (\w+) .*",
        "".join((ROOT / f"{name}.md").read_text() for name in ("README", "REFERENCE")),
        re.MULTILINE,
    )
    lines = re.findall(
        r"^    python prepare_data\.py .*",
        "".join((ROOT / f"{name}.md").read_text() for name in ("README", "REFERENCE")),
        re.MULTILINE,
    )
    assert {"hub", "avqa", "check", "filter"} <= set(commands)
    for name, line in zip(commands, lines, strict=True):
        parameters = inspect.signature(getattr(prepare_data, name)).parameters
        assert set(re.findall(r"--(\w+)", line)) <= parameters.keys(), line
