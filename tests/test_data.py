import json
import re

import numpy as np
import pytest
import soundfile
import torch
from conftest import CONVERTED, OWN, inputs_of, load_examples, write

from data import (
    PROMPTS,
    BadInput,
    Example,
    chat_text,
    check_audio,
    is_cut,
    load_audio,
    stream_indices,
)
from model import load_model

AVQA = {
    "id": 1,
    "video_name": "x_y-z_000030",
    "video_id": 1,
    "question_text": "What is in the video?",
    "multi_choice": ["dog", "cat"],
    "answer": 1,
    "question_relation": "Both",
    "question_type": "Which",
}
MMAU = {
    "id": "a",
    "audio_id": "./test-mini-audios/a.wav",
    "question": "What is it?",
    "choices": ["dog", "cat"],
    "answer": "cat",
    "dataset": "AudioSet",
    "task": "sound",
    "split": "test-mini",
    "category": ["Reasoning"],
    "sub-category": "x",
    "difficulty": "easy",
}
MMAR = {
    "audio_path": "./audio/a.wav",
    "question": "What is it?",
    "choices": ["dog", "cat"],
    "answer": "cat",
    "modality": "mix",
}


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("source", ["own", "AVQA", "R1-AQA", "MMAU", "MMAR"])
@pytest.mark.parametrize("as_list", [True, False], ids=["JSON list", "JSON Lines"])
def test_every_source_becomes_the_same_example(tmp_path, source, as_list):
    row = {"own": OWN, "AVQA": AVQA, "R1-AQA": CONVERTED, "MMAU": MMAU, "MMAR": MMAR}[source]
    (example,) = load_examples(write(tmp_path / "rows", [row], as_list))
    assert (example.choices, example.answer, example.row) == (["dog", "cat"], "cat", row)
    clip = {"AVQA": "x_y-z_30.wav", "MMAU": "test-mini-audios/a.wav", "MMAR": "audio/a.wav"}.get(
        source, "a.wav"
    )
    assert example.audio == str(tmp_path / clip)


def test_a_row_may_carry_a_thought(tmp_path):
    rows = [OWN | {"thought": "it {meows}"}, OWN, CONVERTED | {"thought": "it meows"}, OWN | {"thought": 3}]
    thoughts = [example.thought for example in load_examples(write(tmp_path / "rows", rows))]
    assert thoughts == ["it {meows}", "", "it meows", ""]


def test_avqa_asks_about_the_audio_and_others_stay_as_they_are(tmp_path):
    path = write(tmp_path / "rows", [CONVERTED, AVQA, AVQA | {"answer": None}, OWN])
    questions = [example.question for example in load_examples(path, for_training=False)]
    assert questions == ["What is in the audio?"] * 3 + ["What is in the video?"]


def test_test_rows_without_answers_can_be_answered_but_not_trained_on(tmp_path):
    path = write(tmp_path / "rows", [{k: v for k, v in MMAU.items() if k != "answer"}, MMAU | {"answer": ""}])
    assert [example.answer for example in load_examples(path, for_training=False)] == [None, None]
    with pytest.raises(BadInput, match="rows:1: has no answer"):
        load_examples(path)


@pytest.mark.parametrize(
    "name", ["x_y-z_30.wav", "x_y-z_000030.wav", "x_y-z_000000.wav", "x_y-z_000030.flac", "x_y-z_30.mp3"]
)
def test_avqa_clips_are_found_under_every_known_name(tmp_path, name):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / name).touch()
    (example,) = load_examples(write(tmp_path / "rows", [AVQA]), str(tmp_path / "clips"))
    assert example.audio == str(tmp_path / "clips" / name)


@pytest.mark.parametrize("start", [0, 110])
def test_avqa_clips_may_begin_elsewhere(tmp_path, start):
    (tmp_path / f"x_y-z_{start}.wav").touch()
    rows = write(tmp_path / "rows", [AVQA | {"video_name": f"x_y-z_{start:06d}"}])
    assert load_examples(rows, str(tmp_path))[0].audio == str(tmp_path / f"x_y-z_{start}.wav")


def test_clips_are_found_in_the_folder_itself_too(tmp_path):
    (tmp_path / "a.wav").touch()
    assert load_examples(write(tmp_path / "rows", [MMAU]), str(tmp_path))[0].audio == str(tmp_path / "a.wav")


BAD_ROWS = {
    "not an object": (["a"], "not a JSON object"),
    "no question": (OWN | {"question": " "}, "no question (key 'question')"),
    "no AVQA question": (
        {"multi_choice": ["a", "b"], "answer": 0, "audio_path": "a"},
        "no question (key 'question_text')",
    ),
    "no options": (
        {k: v for k, v in OWN.items() if k != "choices"},
        "no list of at least two options (key 'choices')",
    ),
    "one option": (OWN | {"choices": ["cat"]}, "at least two options"),
    "options as text": (OWN | {"choices": "dog, cat"}, "at least two options"),
    "empty option": (OWN | {"choices": ["cat", ""]}, "option 2 is not text: ''"),
    "option is null": (AVQA | {"multi_choice": [None, "cat"]}, "option 1 is not text: None"),
    "index out of range": (AVQA | {"answer": 2}, "an index from 0 to 1, not 2"),
    "negative index": (AVQA | {"answer": -1}, "an index from 0 to 1, not -1"),
    "index as text": (AVQA | {"answer": "cat"}, "an index from 0 to 1, not 'cat'"),
    "not an option": (OWN | {"answer": "bird"}, "answer 'bird' is not among the options ['dog', 'cat']"),
    "no audio": ({k: v for k, v in OWN.items() if k != "audio"}, "no audio"),
    "special token in a thought": (OWN | {"thought": "hm<|im_end|>"}, "special token <|im_end|>"),
    "special token": (OWN | {"question": "What is <|AUDIO|>?"}, "special token <|AUDIO|>"),
}


@pytest.mark.parametrize("row, says", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_with_its_file_line_and_reason(tmp_path, row, says):
    for as_list, place in ((False, "rows:3: "), (True, "rows: row 3: ")):
        with pytest.raises(BadInput) as error:
            load_examples(write(tmp_path / "rows", [OWN, OWN, row], as_list))
        assert place in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


def test_a_benchmarks_answer_need_not_be_an_option(tmp_path):
    (example,) = load_examples(write(tmp_path / "rows", [OWN | {"answer": "bird"}]), for_training=False)
    assert example.answer == "bird"


@pytest.mark.parametrize(
    "text, says",
    [("", "no rows"), ("[]", "no rows"), ("{}\n{'a': 1}", ":2: not JSON"), ("[\n1,\n", ":3: not JSON")],
)
def test_a_file_that_is_no_data_is_refused(tmp_path, text, says):
    (tmp_path / "rows").write_text(text.replace("{}", json.dumps(OWN)))
    with pytest.raises(BadInput, match=re.escape(says)):
        load_examples(str(tmp_path / "rows"))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "rows").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "rows"):
        with pytest.raises(BadInput, match="cannot be read as text"):
            load_examples(str(path))


def test_a_clip_found_by_its_file_name_alone_is_marked(tmp_path):
    for path in ("a.wav", "sub/b.wav"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    names = ["a.wav", "./sub/b.wav", "other/a.wav", str(tmp_path / "a.wav"), "/elsewhere/a.wav", "no/c.wav"]
    examples = load_examples(write(tmp_path / "rows", [OWN | {"audio": name} for name in names]))
    assert [example.by_name for example in examples] == [False, False, True, False, True, False]


def test_missing_clips_are_counted(tmp_path):
    (tmp_path / "a.wav").touch()
    examples = load_examples(
        write(tmp_path / "rows", [OWN, OWN | {"audio": "b.wav"}, OWN | {"audio": "c.wav"}])
    )
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


# ---------------------------------------------------------------- prompts and audio


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
@pytest.mark.parametrize(
    "kind, subtype",
    [("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)],
)
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
    assert load_audio(str(tmp_path / "clip.wav"))[4_000:12_000] == pytest.approx(
        tone()[4_000:12_000], abs=1e-3
    )


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


@pytest.mark.parametrize(
    "kind, subtype",
    [("WAV", "PCM_16"), ("WAVEX", "PCM_24"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)],
)
def test_a_clip_that_is_cut_short_is_refused(tmp_path, kind, subtype):
    soundfile.write(tmp_path / "whole", tone(10), 16_000, format=kind, subtype=subtype)
    assert len(load_audio(str(tmp_path / "whole"))) == pytest.approx(160_000, rel=0.02)
    (tmp_path / "half").write_bytes(
        (tmp_path / "whole").read_bytes()[: (tmp_path / "whole").stat().st_size // 2]
    )
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
    assert [is_cut(toy_model[1], load_audio(example.audio)) for example in examples] == [
        False,
        False,
        True,
        True,
    ]
    assert inputs["feature_attention_mask"].sum(1).tolist() == [150, 200, 200, 200]


def test_the_model_hears_what_the_processor_was_given(toy_model, examples):
    """Old names of the processor's argument are dropped in silence, and the model answers blind."""
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:1], "answer")
    other = inputs_of(processor, [Example(**vars(examples[0]) | {"audio": examples[1].audio})], "answer")
    assert torch.equal(inputs["input_ids"], other["input_ids"])
    assert (model(**inputs).logits - model(**other).logits).abs().max() > 1e-2
