"""Questions about sounds: rows of the known datasets, the three prompts, audio, batches, files.

A row of any of these becomes one `Example`; anything else is refused with file, row and reason:

    own JSON Lines       audio       question       choices       answer: the option's text
    AVQA, as R1-AQA has  audio_path  question_text  multi_choice  answer: an index
    AVQA, original       video_name  question_text  multi_choice  answer: an index
    MMAU                 audio_id    question       choices       answer: text (Test has none)
    MMAR                 audio_path  question       choices       answer: text
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr
import torch
from tqdm import tqdm

SAMPLE_RATE = 16_000  # Hz, what the Whisper front end of Qwen2-Audio takes
STEM = "{question} Please choose the answer from the following options: {choices}."
PROMPTS = {  # R1-AQA's prompts 1 to 3; {choices} is the Python list, as upstream prints it
    "plain": STEM,
    "answer": STEM + " Output the final answer in <answer> </answer>.",
    "think": STEM
    + " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
}


class BadInput(Exception):
    """Bad input, said in one line: what, which file, which row."""


@dataclass
class Example:
    audio: str  # path of the clip
    question: str
    choices: list[str]
    answer: str | None  # the text of the true option; None where the dataset has no answers
    row: dict  # the row as it was read
    location: str  # file and row, for messages


# ---------------------------------------------------------------- rows


def load_examples(path: str, audio_dir: str | None = None, need_answers: bool = True) -> list[Example]:
    """Read a JSON list or JSON Lines file. Raises BadInput at the first row that cannot be used.

    Clips are looked for in `audio_dir`, or beside the file; whether they exist is `check_audio`'s business.
    """
    folder = audio_dir or os.path.dirname(path)
    examples = [to_example(row, location, folder) for row, location in read_rows(path)]
    if need_answers:
        for example in examples:
            check_answer(example)
    return examples


def check_answer(example: Example) -> None:
    """Raise BadInput unless the answer is one of the options, as training needs it."""
    if example.answer is None:
        raise BadInput(f"{example.location}: has no answer to compare with")
    if example.answer.strip() not in [choice.strip() for choice in example.choices]:
        raise BadInput(
            f"{example.location}: answer {example.answer!r} is not among the options {example.choices}"
        )


def read_rows(path: str) -> list[tuple[object, str]]:
    """Rows with their locations: (row, "file:line") of JSON Lines, (row, "file: row n") of a JSON list."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{path}: cannot be read as text ({getattr(error, 'strerror', None) or 'not UTF-8'})"
        ) from None
    rows, first = [], 1
    try:
        if text.lstrip().startswith("["):
            rows = [(row, f"{path}: row {n}") for n, row in enumerate(json.loads(text), 1)]
        else:
            for first, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append((json.loads(line), f"{path}:{first}"))
    except json.JSONDecodeError as error:
        location = f"{path}:{first + error.lineno - 1}"
        raise BadInput(
            f"{location}: not JSON ({error.msg}); a JSON list or one JSON object a line is read"
        ) from None
    if not rows:
        raise BadInput(f"{path}: holds no rows")
    return rows


def to_example(row: object, location: str, folder: str) -> Example:
    """One row of any known dataset. Raises BadInput with the location and the reason."""

    def refuse(reason):
        raise BadInput(f"{location}: {reason}")

    if not isinstance(row, dict):
        refuse("not a JSON object")
    is_avqa = (
        "multi_choice" in row or "question_text" in row
    )  # its answers are indices, and its questions say "video"
    question = row.get("question_text" if is_avqa else "question")
    choices = row.get("multi_choice" if is_avqa else "choices")
    if not isinstance(question, str) or not question.strip():
        refuse(f"no question (key '{'question_text' if is_avqa else 'question'}')")
    if not isinstance(choices, list) or len(choices) < 2:
        refuse(f"no list of at least two options (key '{'multi_choice' if is_avqa else 'choices'}')")
    for n, choice in enumerate(choices, 1):
        if isinstance(choice, bool) or not isinstance(choice, (str, int, float)) or not str(choice).strip():
            refuse(f"option {n} is not text: {choice!r}")
    choices = [str(choice) for choice in choices]
    if special := re.search(r"<\|\w+\|>", " ".join([question, *choices])):
        refuse(f"the text holds the special token {special[0]}")

    if is_avqa:
        question = question.replace("video", "audio")
    answer = row.get("answer")
    if answer is None or answer == "":  # as in MMAU's Test
        answer = None
    elif is_avqa:
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            refuse(f"answer must be an index from 0 to {len(choices) - 1}, not {answer!r}")
        answer = choices[answer]
    answer = None if answer is None else str(answer)
    return Example(find_clip(row, location, folder), question, choices, answer, row, location)


def find_clip(row: dict, location: str, folder: str) -> str:
    """Path of a row's clip: the first of its likely names that exists, else the likeliest."""
    key = next((key for key in ("audio", "audio_path", "audio_id", "video_name") if key in row), None)
    name = row.get(key)
    if not isinstance(name, str) or not name.strip():
        raise BadInput(f"{location}: no audio (key 'audio', 'audio_path', 'audio_id' or 'video_name')")
    if (
        key == "video_name"
    ):  # original AVQA, `<youtube id>_<start in six digits>`: people name the clip variously
        video, _, start = name.rpartition("_")
        stems = f"{video}_{start.lstrip('0')}", name, f"{video}_000000"
        names = [f"{stem}.{kind}" for kind in ("wav", "flac", "mp3", "ogg") for stem in stems]
    else:
        names = [name, os.path.basename(name)]
    paths = [os.path.normpath(os.path.join(folder, name)) for name in names]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def check_audio(examples: list[Example], skip: bool = False) -> int:
    """How many clips do not exist. Raises BadInput if any is missing; with `skip` only if all are."""
    missing = [example for example in examples if not os.path.isfile(example.audio)]
    if missing and not (skip and len(missing) < len(examples)):
        more = f" ({len(missing)} of {len(examples)} clips are missing)" if len(missing) > 1 else ""
        first = f"{missing[0].location}: no audio file {missing[0].audio}"
        raise BadInput(f"{first}{more}; is --audio_dir right?")
    return len(missing)


def stream_indices(n: int, seed: int, start: int, count: int) -> list[int]:
    """Entries start..start+count-1 of an endless stream of row indices, each epoch a new permutation."""

    def index(k):
        return int(np.random.default_rng((seed, k // n)).permutation(n)[k % n])

    return [index(k) for k in range(start, start + count)]


# ---------------------------------------------------------------- prompts and audio


def chat_text(processor, example: Example, prompt: str) -> str:
    """The prompt in the model's chat template, up to where the answer begins."""
    question = PROMPTS[prompt].format(question=example.question, choices=example.choices)
    content = [{"type": "audio", "audio_url": example.audio}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def open_audio(path: str) -> soundfile.SoundFile:
    """Open a clip, reading its header only. Raises BadInput if it is no sound, under 0.1 s, or cut short."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such audio file")
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:  # TypeError: a name that ends in .raw
        raise BadInput(f"{path}: cannot be read as audio ({getattr(error, 'error_string', error)})") from None
    # libsndfile's log tells what its numbers hide; of 2 GiB and more the writer could not know the size
    stated = re.search(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info)
    cut = stated and int(stated[2]) < 0.9 * int(stated[1]) < 1.9e9
    if cut or "lacks an end-of-stream bit" in file.extra_info:
        raise BadInput(f"{path}: is cut short ({file.frames / file.samplerate:.1f} s are left)")
    if file.frames < file.samplerate / 10:
        length = f"{file.frames} samples at {file.samplerate} Hz"
        raise BadInput(f"{path}: empty audio ({length}, and 0.1 s is the least)")
    return file


def load_audio(path: str) -> np.ndarray:
    """Samples (n,) float32 at 16 kHz: channel 0, as R1-AQA (not a mean), resampled by soxr.

    Raises BadInput on what `open_audio` refuses, and on samples that are not there or not finite.
    """
    with open_audio(path) as file:
        try:
            samples = file.read(dtype="float32", always_2d=True)[:, 0]
        except soundfile.LibsndfileError as error:
            raise BadInput(f"{path}: cannot be read as audio ({error.error_string})") from None
        if len(samples) < 0.9 * file.frames:  # a tenth, for MP3 headers are not exact
            raise BadInput(f"{path}: is cut short ({len(samples)} of {file.frames} samples are there)")
    wave = samples if file.samplerate == SAMPLE_RATE else soxr.resample(samples, file.samplerate, SAMPLE_RATE)
    if not np.isfinite(wave).all():
        raise BadInput(f"{path}: has samples that are not finite numbers")
    return wave


@torch.autocast("cpu", enabled=False)  # features are fp32, whatever the model around computes in
def make_batch(processor, examples: list[Example], waves: list[np.ndarray], prompt: str) -> dict:
    """Model inputs for B examples and their samples (n,) at 16 kHz.

    input_ids, attention_mask: (B, P), padded on the left. input_features: (B, mel bins, frames), log-mel,
    10 ms a frame, always the whole window (30 s; what is longer is cut). feature_attention_mask: (B, frames),
    1 where there is sound.
    """
    texts = [chat_text(processor, example, prompt) for example in examples]
    # `audio=`, not `audios=`: current transformers drop the old name and the model answers blind
    tensors = dict(padding=True, return_tensors="pt")
    return dict(processor(text=texts, audio=waves, sampling_rate=SAMPLE_RATE, **tensors))


def is_cut(processor, wave: np.ndarray) -> bool:
    """Whether a clip is longer than the model hears."""
    return len(wave) > processor.feature_extractor.n_samples


@dataclass
class Batch:
    """The prompts of a step on this process."""

    first: int  # index of the first prompt in the run's stream of prompts
    examples: list[Example]
    inputs: dict  # of the model, see make_batch
    metrics: dict  # of the clips


def read_batch(processor, examples: list[Example], config, first: int, B: int) -> Batch:
    """B prompts of the stream. With --skip_bad_audio the next row replaces a bad one; else it is refused."""
    batch, waves, skipped = [], [], 0
    for i in stream_indices(len(examples), config.seed, first, B):
        for k in range(len(examples)):  # the row itself, or the next that can be read
            example = examples[(i + k) % len(examples)]
            try:
                waves.append(load_audio(example.audio))
                break
            except BadInput as error:
                bad = BadInput(f"{example.location}: {error}")
                if not config.skip_bad_audio:
                    raise bad from None
                tqdm.write(f"skipped: {bad}")
                skipped += 1
        else:
            raise bad  # no row can be read
        batch.append(example)
    inputs = make_batch(processor, batch, waves, config.prompt)
    cut = sum(is_cut(processor, wave) for wave in waves)
    return Batch(first, batch, inputs, {"clips_cut": cut / B, "clips_skipped": skipped / B})


def select_rows(inputs: dict, rows: slice) -> dict:
    """Some prompts of a batch, without the padding that only the others needed."""
    part = {name: value[rows] for name, value in inputs.items()}
    left = part["attention_mask"].any(0).long().argmax()
    return part | {name: part[name][:, left:] for name in ("input_ids", "attention_mask")}


def decode(processor, eos_ids: list[int], ids: torch.Tensor, mask: torch.Tensor) -> list[list[str]]:
    """Texts [B][G] of completions (B, G, T) without the final EOS; other special tokens stay visible."""

    def text(tokens, real):
        return processor.tokenizer.decode([token for token in tokens[real].tolist() if token not in eos_ids])

    return [[text(o, m) for o, m in zip(group, masks)] for group, masks in zip(ids.cpu(), mask.cpu())]


# ---------------------------------------------------------------- files


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def write_whole(path: str, text: str) -> None:
    """Write a file that is there whole or not at all. Raises BadInput where it cannot be written."""
    try:
        # half a surrogate pair, which JSON can hold and UTF-8 cannot, is written as JSON escapes it
        with open(f"{path}.partial", "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.replace(f"{path}.partial", path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from None


def write_rows(path: str, rows: list) -> None:
    """Write rows as JSON Lines, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def make_folder(path: str) -> None:
    """Make a folder for results. Raises BadInput where it cannot be made."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--output {path or repr('')}: cannot be made ({error.strerror})") from None
