import json
import re

import numpy as np
import pytest
import soundfile
import torch
from oracle import inputs_of

import data
from data import PROMPTS, BadInput, Example, chat_text, check_audio, is_cut, load_audio, load_examples, stream_indices
from model import load_model

OWN = {"audio": "a.wav", "question": "What is in the video?", "choices": ["dog", "cat"], "answer": "cat"}
AVQA = {"id": 1, "video_name": "x_y-z_000030", "video_id": 1, "question_text": "What is in the video?", "multi_choice": ["dog", "cat"], "answer": 1, "question_relation": "Both", "question_type": "Which"}  # fmt: skip
CONVERTED = {"video_name": "x_000030", "audio_path": "a.wav", "question_text": "What is in the video?", "multi_choice": ["dog", "cat"], "answer": 1}
MMAU = {"id": "a", "audio_id": "./test-mini-audios/a.wav", "question": "What is it?", "choices": ["dog", "cat"], "answer": "cat", "dataset": "AudioSet", "task": "sound", "split": "test-mini", "category": ["Reasoning"], "sub-category": "x", "difficulty": "easy"}  # fmt: skip
MMAR = {"audio_path": "./audio/a.wav", "question": "What is it?", "choices": ["dog", "cat"], "answer": "cat", "modality": "mix"}


def write(path, rows, as_list=False):
    path.write_text(json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("source", ["own", "AVQA", "R1-AQA", "MMAU", "MMAR"])
@pytest.mark.parametrize("as_list", [True, False], ids=["JSON list", "JSON Lines"])
def test_every_source_becomes_the_same_example(tmp_path, source, as_list):
    row = {"own": OWN, "AVQA": AVQA, "R1-AQA": CONVERTED, "MMAU": MMAU, "MMAR": MMAR}[source]
    (example,) = load_examples(write(tmp_path / "rows", [row], as_list))
    assert (example.choices, example.answer, example.row) == (["dog", "cat"], "cat", row)
    clip = {"AVQA": "x_y-z_30.wav", "MMAU": "test-mini-audios/a.wav", "MMAR": "audio/a.wav"}.get(source, "a.wav")
    assert example.audio == str(tmp_path / clip)


def test_avqa_asks_about_the_audio_and_others_stay_as_they_are(tmp_path):
    path = write(tmp_path / "rows", [CONVERTED, AVQA, AVQA | {"answer": None}, OWN])
    questions = [example.question for example in load_examples(path, need_answers=False)]
    assert questions == ["What is in the audio?"] * 3 + ["What is in the video?"]


def test_test_rows_without_answers_can_be_answered_but_not_trained_on(tmp_path):
    path = write(tmp_path / "rows", [{k: v for k, v in MMAU.items() if k != "answer"}, MMAU | {"answer": ""}])
    assert [example.answer for example in load_examples(path, need_answers=False)] == [None, None]
    with pytest.raises(BadInput, match="rows:1: has no answer"):
        load_examples(path)


@pytest.mark.parametrize("name", ["x_y-z_30.wav", "x_y-z_000030.wav", "x_y-z_000000.wav", "x_y-z_000030.flac", "x_y-z_30.mp3"])
def test_avqa_clips_are_found_under_every_known_name(tmp_path, name):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / name).touch()
    (example,) = load_examples(write(tmp_path / "rows", [AVQA]), str(tmp_path / "clips"))
    assert example.audio == str(tmp_path / "clips" / name)


def test_avqa_clips_may_begin_elsewhere(tmp_path):
    (tmp_path / "x_y-z_110.wav").touch()
    rows = write(tmp_path / "rows", [AVQA | {"video_name": "x_y-z_000110"}])
    assert load_examples(rows, str(tmp_path))[0].audio == str(tmp_path / "x_y-z_110.wav")


def test_clips_are_found_in_the_folder_itself_too(tmp_path):
    (tmp_path / "a.wav").touch()
    assert load_examples(write(tmp_path / "rows", [MMAU]), str(tmp_path))[0].audio == str(tmp_path / "a.wav")


BAD_ROWS = {
    "not an object": (["a"], "not a JSON object"),
    "no question": (OWN | {"question": " "}, "no question (key 'question')"),
    "no AVQA question": ({"multi_choice": ["a", "b"], "answer": 0, "audio_path": "a"}, "no question (key 'question_text')"),
    "no options": ({k: v for k, v in OWN.items() if k != "choices"}, "no list of at least two options (key 'choices')"),
    "one option": (OWN | {"choices": ["cat"]}, "at least two options"),
    "options as text": (OWN | {"choices": "dog, cat"}, "at least two options"),
    "empty option": (OWN | {"choices": ["cat", ""]}, "option 2 is not text: ''"),
    "option is null": (AVQA | {"multi_choice": [None, "cat"]}, "option 1 is not text: None"),
    "index out of range": (AVQA | {"answer": 2}, "an index from 0 to 1, not 2"),
    "negative index": (AVQA | {"answer": -1}, "an index from 0 to 1, not -1"),
    "index as text": (AVQA | {"answer": "cat"}, "an index from 0 to 1, not 'cat'"),
    "not an option": (OWN | {"answer": "bird"}, "answer 'bird' is not among the options ['dog', 'cat']"),
    "no audio": ({k: v for k, v in OWN.items() if k != "audio"}, "no audio"),
    "special token": (OWN | {"question": "What is <|AUDIO|>?"}, "special token <|AUDIO|>"),
}


@pytest.mark.parametrize("row, says", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_with_its_file_line_and_reason(tmp_path, row, says):
    for as_list, place in ((False, "rows:3: "), (True, "rows: row 3: ")):
        with pytest.raises(BadInput) as error:
            load_examples(write(tmp_path / "rows", [OWN, OWN, row], as_list))
        assert place in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


def test_a_benchmarks_answer_need_not_be_an_option(tmp_path):
    (example,) = load_examples(write(tmp_path / "rows", [OWN | {"answer": "bird"}]), need_answers=False)
    assert example.answer == "bird"


@pytest.mark.parametrize("text, says", [("", "no rows"), ("[]", "no rows"), ("{}\n{'a': 1}", ":2: not JSON"), ("[\n1,\n", ":3: not JSON")])
def test_a_file_that_is_no_data_is_refused(tmp_path, text, says):
    (tmp_path / "rows").write_text(text.replace("{}", json.dumps(OWN)))
    with pytest.raises(BadInput, match=re.escape(says)):
        load_examples(str(tmp_path / "rows"))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "rows").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "rows"):
        with pytest.raises(BadInput, match="cannot be read as text"):
            load_examples(str(path))


def test_missing_clips_are_counted(tmp_path):
    (tmp_path / "a.wav").touch()
    examples = load_examples(write(tmp_path / "rows", [OWN, OWN | {"audio": "b.wav"}, OWN | {"audio": "c.wav"}]))
    with pytest.raises(BadInput, match=r"rows:2: no audio file .*b.wav \(2 of 3 clips are missing\)"):
        check_audio(examples)
    assert check_audio(examples, skip=True) == 2
    with pytest.raises(BadInput, match=r"\(2 of 2 clips are missing\)"):  # a wrong folder, most likely
        check_audio(examples[1:], skip=True)


def test_the_stream_is_permutations_one_after_another():
    stream = stream_indices(10, 42, 0, 30)
    epochs = [stream[:10], stream[10:20], stream[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert stream_indices(10, 42, 7, 8) == stream[7:15]  # any window of it, whoever asks
    assert stream_indices(10, 43, 0, 10) != epochs[0]


# ----------------------------------------------------------------------------------------------- prompts and audio


def test_prompts_are_r1_aqas(toy_model):
    asked = "Which? Please choose the answer from the following options: [\"it's\", '{b}']."
    example = Example("a.wav", "Which?", ["it's", "{b}"], "{b}", {}, "")
    texts = {prompt: chat_text(toy_model[1], example, prompt) for prompt in PROMPTS}
    frame = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert texts["plain"] == frame.format(asked)
    assert texts["answer"] == frame.format(asked + " Output the final answer in <answer> </answer>.")
    assert texts["think"] == frame.format(
        asked + " Output the thinking process in <think> </think> and final answer in <answer> </answer>."
    )


def tone(seconds=1.0, rate=16_000, hertz=440):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("kind, subtype", [("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)])
def test_audio_of_any_kind_becomes_the_same_16_khz(tmp_path, rate, kind, subtype):
    path = tmp_path / "clip.wav"  # whatever it is: libsndfile reads by content
    soundfile.write(path, tone(rate=rate), rate, format=kind, subtype=subtype)
    wave = load_audio(str(path))
    middle = slice(4_000, 12_000)  # codecs blur the ends
    assert wave.dtype == np.float32 and abs(len(wave) - 16_000) < 2_000
    spectrum = np.abs(np.fft.rfft(wave[middle]))
    assert spectrum.argmax() * 2 == 440 and np.abs(wave[middle]).max() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("channels", [2, 6])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_channel_0_is_heard_and_no_other(tmp_path, channels, rate):
    clip = np.zeros((rate, channels), np.float32)
    clip[:, 0], clip[:, 1] = tone(rate=rate), 0.9
    soundfile.write(tmp_path / "clip.wav", clip, rate, subtype="FLOAT")
    assert load_audio(str(tmp_path / "clip.wav"))[4_000:12_000] == pytest.approx(tone()[4_000:12_000], abs=1e-3)


def test_what_is_no_sound_is_refused_by_name(tmp_path):
    def refused(name, match):
        with pytest.raises(BadInput, match=f"{name}: {match}"):
            load_audio(str(tmp_path / name))

    refused("nowhere.wav", "no such audio file")
    (tmp_path / "text.wav").write_text("not a sound")
    refused("text.wav", "cannot be read as audio")
    (tmp_path / "nothing.wav").touch()
    refused("nothing.wav", "cannot be read as audio")
    (tmp_path / "text.raw").write_text("not a sound")
    refused("text.raw", "cannot be read as audio")
    soundfile.write(tmp_path / "empty.wav", tone(0), 16_000)
    refused("empty.wav", "empty audio")
    soundfile.write(tmp_path / "nan.wav", np.where(tone() > 0.4, np.nan, tone()), 16_000, subtype="FLOAT")
    refused("nan.wav", "has samples that are not finite")


@pytest.mark.parametrize("kind, subtype", [("WAV", "PCM_16"), ("WAVEX", "PCM_24"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)])
def test_a_clip_that_is_cut_short_is_refused(tmp_path, kind, subtype):
    soundfile.write(tmp_path / "whole", tone(10), 16_000, format=kind, subtype=subtype)
    assert len(load_audio(str(tmp_path / "whole"))) == pytest.approx(160_000, rel=0.02)
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[: (tmp_path / "whole").stat().st_size // 2])
    with pytest.raises(BadInput, match="half: (is cut short|cannot be read as audio)"):
        load_audio(str(tmp_path / "half"))


def test_a_wav_whose_writer_could_not_know_its_length_is_read(tmp_path):
    """ffmpeg and sox leave such sizes when they write into a pipe."""
    soundfile.write(tmp_path / "clip.wav", tone(1), 16_000)
    content = bytearray((tmp_path / "clip.wav").read_bytes())
    for size in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):
        content[4:8] = content[40:44] = size
        (tmp_path / "piped.wav").write_bytes(content)
        assert np.array_equal(load_audio(str(tmp_path / "piped.wav")), load_audio(str(tmp_path / "clip.wav")))


def test_a_batch_is_padded_on_the_left_whatever_the_config_says(folder, examples, tmp_path):
    _, processor = load_model(str(folder / "model"))
    processor.tokenizer.padding_side = "right"
    load_model(str(folder / "model"))[0].save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, processor = load_model(str(tmp_path))
    inputs = inputs_of(processor, examples[:4], "answer")
    padding = inputs["attention_mask"] == 0
    assert padding.any() and (padding[:, :-1] >= padding[:, 1:]).all()  # padding first, then none


def test_clips_past_the_window_are_counted(toy_model, tmp_path):
    rows = []
    for name, seconds in (("short", 1.5), ("whole", 2.0), ("long", 2.5), ("longer", 40.0)):
        soundfile.write(tmp_path / f"{name}.wav", tone(seconds), 16_000)
        rows.append(OWN | {"audio": f"{name}.wav"})
    examples = load_examples(write(tmp_path / "rows", rows))
    inputs = inputs_of(toy_model[1], examples, "answer")
    assert [is_cut(toy_model[1], load_audio(example.audio)) for example in examples] == [False, False, True, True]
    assert inputs["feature_attention_mask"].sum(1).tolist() == [150, 200, 200, 200]


def test_the_model_hears_what_the_processor_was_given(toy_model, examples):
    """Old names of the processor's argument are dropped in silence, and the model answers blind."""
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:1], "answer")
    other = inputs_of(processor, [Example(**vars(examples[0]) | {"audio": examples[1].audio})], "answer")
    assert torch.equal(inputs["input_ids"], other["input_ids"])
    assert (model(**inputs).logits - model(**other).logits).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------- models


def test_a_models_class_comes_from_its_config(folder, tmp_path):
    (tmp_path / "any-name").symlink_to(folder / "model")
    assert type(load_model(str(tmp_path / "any-name"))[0]).__name__ == "Qwen2AudioForConditionalGeneration"
    config = json.loads((folder / "model" / "config.json").read_text())
    (tmp_path / "qwen2-audio").mkdir()
    (tmp_path / "qwen2-audio" / "config.json").write_text(json.dumps(config["text_config"]))
    with pytest.raises(BadInput, match="is a qwen2 model"):
        load_model(str(tmp_path / "qwen2-audio"))


# --------------------------------------------------------------------------------------------- preparing and checking


def run_data(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["data.py", *map(str, flags)])
    data.main()


def avqa(name, **more):
    return AVQA | {"video_name": f"{name}_000030"} | more


@pytest.fixture
def avqa_files(tmp_path):
    """AVQA with every naming habit and every dirty row; the clips, and what should come of them."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "lists").mkdir()
    names = {"a": "a_30.wav", "-b_c": "-b_c_000030.wav", "d": "d_000000.wav", "e": "e_30.flac", "f": "f_000030.mp3", "g": "g_000000.ogg"}
    for name in names.values():
        soundfile.write(tmp_path / "clips" / name, tone(2), 16_000, format=name.split(".")[1].upper())
    good = [avqa(name, id=n) for n, name in enumerate(names)]
    (tmp_path / "clips" / "text_30.wav").write_text("not a sound")
    (tmp_path / "clips" / "empty_30.wav").touch()
    bad = {
        "multi_choice": [{"id": 9, "video_name": "a_000030", "question_text": "?", "answer": 0}, avqa("a", multi_choice=[]), avqa("a", multi_choice=["x"])],
        "option": [avqa("a", multi_choice=["x", ""]), avqa("a", multi_choice=["x", None]), avqa("a", multi_choice=["x", ["y"]])],
        "index": [avqa("a", answer=4), avqa("a", answer="cat")],
        "no answer": [avqa("a", answer=None)],
        "no such audio file": [avqa("gone"), avqa("gone_too")],
        "cannot be read": [avqa("text"), avqa("empty")],
    }  # fmt: skip
    rows = good + [row for part in bad.values() for row in part]
    return write(tmp_path / "lists" / "train_qa.json", rows, as_list=True), names, bad


def test_avqa_becomes_training_rows(tmp_path, monkeypatch, capsys, avqa_files):
    questions, names, bad = avqa_files
    (tmp_path / "out").mkdir()
    run_data(monkeypatch, "avqa", "--questions", questions, "--audio_dir", tmp_path / "clips", "--output", tmp_path / "out" / "train.jsonl")
    examples = load_examples(str(tmp_path / "out" / "train.jsonl"))  # no --audio_dir: paths are relative to the file
    assert check_audio(examples) == 0
    assert [example.audio for example in examples] == [str(tmp_path / "clips" / name) for name in names.values()]
    for n, example in enumerate(examples):
        assert (example.question, example.choices, example.answer) == ("What is in the audio?", ["dog", "cat"], "cat")
        assert example.row["id"] == n and example.row["question_type"] == "Which"
    lost = [json.loads(line) for line in open(tmp_path / "out" / "train.left_out.jsonl")]
    assert [entry["row"] for entry in lost] == [row for part in bad.values() for row in part]
    for entry, word in zip(lost, [word for word, part in bad.items() for _ in part]):
        assert word in entry["reason"] and "train_qa.json: row " in entry["reason"]
    assert "19 questions: 6 found, 2 without a clip, 11 unusable" in capsys.readouterr().out


def test_r1_aqas_own_file_is_converted_too(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", tone(), 16_000)
    run_data(monkeypatch, "avqa", "--questions", write(tmp_path / "r1.jsonl", [CONVERTED]), "--audio_dir", tmp_path, "--output", tmp_path / "train.jsonl")
    (example,) = load_examples(str(tmp_path / "train.jsonl"))
    assert (example.audio, example.answer) == (str(tmp_path / "a.wav"), "cat")
    assert not (tmp_path / "train.left_out.jsonl").exists()


def test_a_conversion_that_cannot_be_is_refused_and_leaves_nothing(tmp_path, monkeypatch, avqa_files):
    flags = ["avqa", "--questions", avqa_files[0], "--output", tmp_path / "train.jsonl", "--audio_dir"]
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        run_data(monkeypatch, *flags, "nowhere")
    with pytest.raises(BadInput, match="none of 19 rows can be used; the first: .*train_qa.json: row 1: .*a_30.wav: no such audio file"):
        run_data(monkeypatch, *flags, tmp_path / "lists")
    with pytest.raises(BadInput, match="cannot be written"):
        run_data(monkeypatch, *flags, tmp_path / "clips", "--output", tmp_path / "nowhere" / "train.jsonl")
    assert not list(tmp_path.glob("train*"))
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(BadInput, match="already there"):
        run_data(monkeypatch, *flags, tmp_path / "clips")


def test_check_names_all_that_is_wrong(tmp_path, monkeypatch, capsys):
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
        run_data(monkeypatch, "check", write(tmp_path / "rows.jsonl", rows))
    out = capsys.readouterr().out
    assert status.value.code == 1
    for line, says in (
        (4, "answer 'bird' is not among the options"), (5, r".*text.wav: cannot be read"), (6, r".*gone.wav: no such audio file"), (7, "no list of"),
    ):  # fmt: skip
        assert re.search(rf"unusable: .*rows.jsonl:{line}: {says}", out)
    assert out.count("unusable: ") == 4
    assert re.search(r"odd: .*:1: id 1 is there 2 times\nodd: .*:2: id 1 is there 2 times\nodd: .*:3: an option stands twice", out)
    assert "8 rows, 4 of them unusable, 3 remarks" in out
    assert "shortest 1.0 s, median 1.5, longest 31.0; 1 pass 30 s" in out
    assert "Hz: 8000: 1, 16000: 2, 48000: 1" in out and "channels: 1: 2, 2: 1, 6: 1" in out
    assert "options: 2: 6, 3: 1" in out and "task: None: 4, music: 2, sound: 1" in out and "no answer: 1 rows" in out


def test_check_finds_nothing_wrong_with_the_toy(folder, monkeypatch):
    run_data(monkeypatch, "check", folder / "train.jsonl", "--decode")  # would exit otherwise


def test_check_reads_whole_clips_only_when_told(tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "a.wav", np.where(tone() > 0.4, np.nan, tone()), 16_000, subtype="FLOAT")
    path = write(tmp_path / "rows.jsonl", [OWN])
    run_data(monkeypatch, "check", path)
    with pytest.raises(SystemExit):
        run_data(monkeypatch, "check", path, "--decode")
    assert "not finite numbers" in capsys.readouterr().out
