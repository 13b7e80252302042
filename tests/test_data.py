"""Rows, clips, prompts and batches as `data.py` makes them. Bad ones are in test_bad_input.py."""

import io
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import CONVERTED, NOISE, OWN, inputs_of, load_examples, mp3, without_length, write

from cli import BadInput
from data import PROMPTS, Example, chat_text, check_audio, is_cut, load_audio, read_batch, stream_indices
from data import write_rows
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
    "question": "What is in the video?",
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
    "question": "What is in the video?",
    "choices": ["dog", "cat"],
    "answer": "cat",
    "modality": "mix",
}
SOURCES = {  # a row, its clip, and its question: R1-AQA turns 'video' into 'audio' in AVQA's questions
    "own": (OWN, "a.wav", "What is in the video?"),
    "AVQA": (AVQA, "x_y-z_30.wav", "What is in the audio?"),
    "R1-AQA": (CONVERTED, "a.wav", "What is in the audio?"),
    "MMAU": (MMAU, "test-mini-audios/a.wav", "What is in the video?"),
    "MMAR": (MMAR, "audio/a.wav", "What is in the video?"),
}


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("row, clip, question", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("as_list", [True, False], ids=["JSON list", "JSON Lines"])
def test_every_source_becomes_the_same_example(tmp_path, row, clip, question, as_list):
    path = write(tmp_path / "rows", [row], as_list)
    place = "rows: row 1" if as_list else "rows:1"
    expected = Example(
        audio=str(tmp_path / clip),
        question=question,
        choices=["dog", "cat"],
        answer="cat",
        row=row,
        location=f"{tmp_path}/{place}",
    )
    assert load_examples(path) == [expected]


def test_numbers_are_options_and_answers_too(tmp_path):
    path = write(tmp_path / "rows", [OWN | {"choices": [2, 2.5], "answer": 2.5}])
    (example,) = load_examples(path)
    assert (example.choices, example.answer) == (["2", "2.5"], "2.5")


def test_a_row_may_have_a_thought(tmp_path):
    rows = [OWN | {"thought": "it {meows}"}, OWN, CONVERTED | {"thought": "it meows"}, OWN | {"thought": 3}]
    thoughts = [example.thought for example in load_examples(write(tmp_path / "rows", rows))]
    assert thoughts == ["it {meows}", "", "it meows", ""]


def test_an_evaluation_takes_rows_without_a_usable_answer(tmp_path):
    """MMAU's Test has no answers, and its test-mini has some that are not among the options."""
    without = {key: value for key, value in MMAU.items() if key != "answer"}
    rows = [without, MMAU | {"answer": ""}, AVQA | {"answer": None}, OWN | {"answer": "bird"}]
    examples = load_examples(write(tmp_path / "rows", rows), for_training=False)
    assert [example.answer for example in examples] == [None, None, None, "bird"]
    assert not any(example.problem for example in examples)


# ---------------------------------------------------------------- where clips are


@pytest.mark.parametrize(
    "name, clip",
    [
        ("x_y-z_000030", "x_y-z_30.wav"),
        ("x_y-z_000030", "x_y-z_000030.wav"),
        ("x_y-z_000030", "x_y-z_000000.wav"),
        ("x_y-z_000030", "x_y-z_000030.flac"),
        ("x_y-z_000030", "x_y-z_30.mp3"),
        ("x_y-z_000000", "x_y-z_0.wav"),
        ("x_y-z_000110", "x_y-z_110.wav"),
    ],
)
def test_avqa_clips_are_found_under_every_known_name(tmp_path, name, clip):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / clip).touch()
    path = write(tmp_path / "rows", [AVQA | {"video_name": name}])
    (example,) = load_examples(path, str(tmp_path / "clips"))
    assert example.audio == str(tmp_path / "clips" / clip)
    assert not example.found_by_name


def test_a_clip_found_by_its_file_name_alone_is_marked(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.wav").touch()
    (tmp_path / "sub" / "b.wav").touch()
    found_by_name = {
        "a.wav": False,
        "./sub/b.wav": False,
        "other/a.wav": True,
        str(tmp_path / "a.wav"): False,
        "/elsewhere/a.wav": True,
        "no/c.wav": False,
    }
    rows = [OWN | {"audio": name} for name in found_by_name]
    examples = load_examples(write(tmp_path / "rows", rows))
    assert [example.found_by_name for example in examples] == list(found_by_name.values())
    assert examples[2].audio == examples[4].audio == str(tmp_path / "a.wav")


def test_missing_clips_are_counted(tmp_path):
    (tmp_path / "a.wav").touch()
    rows = [OWN, OWN | {"audio": "b.wav"}, OWN | {"audio": "c.wav"}]
    examples = load_examples(write(tmp_path / "rows", rows))
    with pytest.raises(BadInput, match=r"rows:2: no audio file .*b.wav \(2 of 3 clips are missing\)"):
        check_audio(examples)
    assert check_audio(examples, skip=True) == 2
    with pytest.raises(BadInput, match=r"\(2 of 2 clips are missing\)"):  # most likely the wrong folder
        check_audio(examples[1:], skip=True)


def test_the_stream_is_one_permutation_after_another():
    stream = stream_indices(10, 42, 0, 30)
    epochs = [stream[:10], stream[10:20], stream[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert stream_indices(10, 42, 7, 8) == stream[7:15]  # any part of it, wherever it starts
    assert stream_indices(10, 43, 0, 10) != epochs[0]


def test_half_a_character_survives_writing(tmp_path):
    """JSON can hold half of a surrogate pair, which a model may produce; UTF-8 cannot."""
    row = OWN | {"completion": "half \ud83d, complete 😀"}
    write_rows(str(tmp_path / "rows"), [row])
    (example,) = load_examples(str(tmp_path / "rows"))
    assert example.row == row


# ---------------------------------------------------------------- prompts


def test_prompts_are_r1_aqas(toy_model):
    _, processor = toy_model
    example = Example("a.wav", "Which?", ["it's", "{b}"], "{b}", {}, "")
    question = "Which? Please choose the answer from the following options: [\"it's\", '{b}']."
    instructions = {
        "plain": "",
        "answer": " Output the final answer in <answer> </answer>.",
        "think": " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
    }
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert instructions.keys() == PROMPTS.keys()
    for prompt, instruction in instructions.items():
        assert chat_text(processor, example, prompt) == chat.format(question + instruction)


# ---------------------------------------------------------------- audio


def tone(seconds=1.0, rate=16_000):
    """A 440 Hz tone."""
    t = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize(
    "kind, subtype",
    [("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)],
)
def test_audio_of_any_kind_becomes_the_same_16_khz(tmp_path, rate, kind, subtype):
    path = str(tmp_path / "clip.wav")  # libsndfile looks at the content, not at the name
    soundfile.write(path, tone(rate=rate), rate, format=kind, subtype=subtype)
    wave = load_audio(path)
    assert wave.dtype == np.float32
    assert abs(len(wave) - 16_000) < 2_000

    middle = wave[4_000:12_000]  # codecs blur the ends
    loudest = np.abs(np.fft.rfft(middle)).argmax() * 2  # Hz
    assert loudest == 440
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("channels", [2, 6])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_only_channel_0_is_used(tmp_path, channels, rate):
    clip = np.full((rate, channels), 0.9, np.float32)
    clip[:, 0] = tone(rate=rate)
    path = str(tmp_path / "clip.wav")
    soundfile.write(path, clip, rate, subtype="FLOAT")
    assert load_audio(path)[4_000:12_000] == pytest.approx(tone()[4_000:12_000], abs=1e-3)


@pytest.mark.parametrize(
    "kind, subtype",
    [("WAV", "PCM_16"), ("WAVEX", "PCM_24"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)],
)
def test_a_truncated_clip_is_refused(tmp_path, kind, subtype):
    soundfile.write(tmp_path / "complete", tone(10), 16_000, format=kind, subtype=subtype)
    assert len(load_audio(str(tmp_path / "complete"))) == pytest.approx(160_000, rel=0.02)
    content = (tmp_path / "complete").read_bytes()
    (tmp_path / "half").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match="half: (is cut short|is empty|LibsndfileError: .*lost sync)"):
        load_audio(str(tmp_path / "half"))


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000], ids=["ffmpeg", "sox"])
def test_a_wav_from_a_pipe_is_read(tmp_path, size):
    """Programs that write to a pipe do not know the length yet, and put such sizes in the header."""
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(), 16_000)
    expected = load_audio(str(path))
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = size.to_bytes(4, "little")
    path.write_bytes(content)
    assert np.array_equal(load_audio(str(path)), expected)


@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2), (8_000, 1)])
def test_a_long_clip_is_read_only_up_to_the_window(tmp_path, rate, channels):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (10 * rate, channels))
    path = str(tmp_path / "long.flac")
    soundfile.write(path, np.tile(noise, (18, 1)), rate)  # three minutes
    everything = load_audio(path)

    tracemalloc.start()
    wave = load_audio(path, window=32_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(wave) == 32_001  # one more than the window, which shows that the clip is cut
    assert np.abs(wave - everything[:32_001]).max() < 1e-4
    assert peak < 8e6  # bytes; the complete clip takes 11 to 64 MB


# ---------------------------------------------------------------- batches


def chunks_of_flac_from_a_pipe(samples):
    """A FLAC file without a length, as ffmpeg writes it to a pipe."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="FLAC")
    content = bytearray(file.getvalue())
    content[21] &= 0xF0  # the number of samples: 36 bits of STREAMINFO
    content[22:26] = bytes(4)
    return bytes(content)


def encoded(samples, kind):
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format=kind)
    return file.getvalue()


def without_last_page(content):
    """An Ogg that ends at a page boundary, without the end-of-stream bit."""
    return content[: content.rindex(b"OggS")]


ID3 = b"ID3\4\0\0" + bytes([0, 2, 0, 0]) + bytes(2 << 14)  # a 32 KiB tag, its size in 7 bits per byte
MUSIC = np.tile(NOISE, 4)  # 8 s
WHOLE = {  # what is in the file, and its length in seconds
    "FLAC from a pipe": (chunks_of_flac_from_a_pipe(MUSIC), 8),
    "two MP3 files joined": (mp3(NOISE) + mp3(MUSIC), 10),
    "two Ogg files joined": (encoded(NOISE, "OGG") + encoded(MUSIC, "OGG"), 10),
    "MP3 with a tag": (ID3 + mp3(MUSIC), 8),
    "MP3 with a tag and no length": (ID3 + without_length(mp3(np.zeros(128_000))), 8),
    "Ogg without an end": (without_last_page(encoded(MUSIC, "OGG")), 7.1),
}


@pytest.mark.parametrize("content, seconds", WHOLE.values(), ids=WHOLE)
def test_a_clip_is_as_long_as_its_decoder_says(tmp_path, content, seconds):
    (tmp_path / "clip").write_bytes(content)
    wave = load_audio(str(tmp_path / "clip"))
    assert len(wave) == pytest.approx(seconds * 16_000, rel=0.1)
    first = load_audio(str(tmp_path / "clip"), window=48_000)  # may reach into the second file
    assert len(first) == 48_001 and np.abs(first - wave[:48_001]).max() < 1e-6


def test_silent_clips_are_counted(tmp_path, folder):
    """Also if only the first channel, the one that the model hears, is silent."""
    right_only = np.stack([np.zeros(16_000), 0.5 * np.ones(16_000)], 1)
    for name, samples in (("silent", np.zeros(16_000)), ("right", right_only), ("tone", tone())):
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000)
    rows = [OWN | {"audio": f"{name}.wav"} for name in ("silent", "right", "tone", "tone")]
    examples = load_examples(write(tmp_path / "rows.jsonl", rows))
    config = SimpleNamespace(seed=0, prompt="answer", skip_bad_audio=False)
    _, processor = load_model(str(folder / "model"))
    assert read_batch(processor, examples, config, 0, 4).metrics["clips_silent"] == 0.5


WHITE_SPACE = "a\xa0dog\tor\u202fso"


def test_options_are_compared_as_they_are_shown(tmp_path, toy_model):
    rows = [OWN | {"choices": [WHITE_SPACE, "cat"], "answer": WHITE_SPACE}]
    rows.append(CONVERTED | {"multi_choice": ["cat", WHITE_SPACE]})
    for example in load_examples(write(tmp_path / "rows.jsonl", rows)):
        assert example.answer == "a dog or so" and "'a dog or so'" in chat_text(
            toy_model[1], example, "answer"
        )


def test_a_path_may_lead_through_a_link(tmp_path):
    (tmp_path / "a" / "questions").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "questions")
    (tmp_path / "a" / "clip.wav").touch()
    rows = write(tmp_path / "a" / "questions" / "rows.jsonl", [OWN | {"audio": "../clip.wav"}])
    assert check_audio(load_examples(str(tmp_path / "link" / "rows.jsonl"))) == 0
    assert check_audio(load_examples(rows)) == 0


def test_a_batch_is_padded_on_the_left_whatever_the_config_says(folder, examples, tmp_path):
    model, processor = load_model(str(folder / "model"))
    processor.tokenizer.padding_side = "right"
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    _, processor = load_model(str(tmp_path))
    mask = inputs_of(processor, examples[:4])["attention_mask"]
    assert (mask == 0).any()
    assert (mask[:, 1:] >= mask[:, :-1]).all()  # padding first, then text


def test_clips_are_padded_or_cut_to_the_window(toy_model, tmp_path):
    """The toy's window is 2 s, 200 frames."""
    _, processor = toy_model
    rows = []
    for seconds in (1.5, 2.0, 2.5, 40.0):
        soundfile.write(tmp_path / f"{seconds}.wav", tone(seconds), 16_000)
        rows.append(OWN | {"audio": f"{seconds}.wav"})
    examples = load_examples(write(tmp_path / "rows", rows))
    inputs = inputs_of(processor, examples)
    assert inputs["input_features"].shape[-1] == 200
    assert inputs["feature_attention_mask"].sum(1).tolist() == [150, 200, 200, 200]
    cut = [is_cut(processor, load_audio(example.audio)) for example in examples]
    assert cut == [False, False, True, True]


def test_features_are_fp32_whatever_the_model_computes_in(toy_model, examples):
    _, processor = toy_model
    features = inputs_of(processor, examples[:2])["input_features"]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = inputs_of(processor, examples[:2])["input_features"]
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, features)


def test_the_model_hears_the_clip(toy_model, examples):
    """Transformers silently ignores old names of the processor's audio argument: it would hear nothing."""
    model, processor = toy_model
    other_clip = Example(**vars(examples[0]) | {"audio": examples[1].audio})
    inputs = inputs_of(processor, examples[:1])
    other = inputs_of(processor, [other_clip])
    assert torch.equal(inputs["input_ids"], other["input_ids"])
    assert (model(**inputs).logits - model(**other).logits).abs().max() > 1e-2
