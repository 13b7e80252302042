"""Questions about sounds: rows of the known datasets, the three prompts, audio, batches, files.

A row of any of these becomes one `Example`; anything else is refused with file, row and reason:

    own JSON Lines       audio       question       choices       answer: the option's text
    AVQA, as R1-AQA has  audio_path  question_text  multi_choice  answer: an index
    AVQA, original       video_name  question_text  multi_choice  answer: an index
    MMAU                 audio_id    question       choices       answer: text (Test has none)
    MMAR                 audio_path  question       choices       answer: text
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

SAMPLE_RATE = 16_000  # Hz, what the front ends of all supported models take
WINDOW = 30 * SAMPLE_RATE  # samples; of a longer clip the rest is cut
LOCK = ".lock"  # in a folder of results
MOST_TOKENS = 4_096  # of a question with its options; MMAU's have about 50
STEM = "{question} Please choose the answer from the following options: {choices}."
PROMPTS = {  # R1-AQA's prompts 1 to 3; {choices} is the Python list, as upstream prints it
    "plain": STEM,
    "answer": STEM + " Output the final answer in <answer> </answer>.",
    "think": STEM
    + " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
}


class BadInput(Exception):
    """Bad input, said in one line: what, which file, which row."""


def printable(text: str) -> str:
    """Text from data or a model for the terminal, which its control characters must not steer."""
    controls = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(controls, lambda match: match[0].encode("unicode_escape").decode(), text)


@contextmanager
def blame(location: str):
    """Whatever goes wrong inside is bad input from this file, row or flag, and becomes its one line."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{location}: {error}") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        raise BadInput(": ".join([location, type(error).__name__, *reason])) from None


@dataclass
class Example:
    audio: str  # path of the clip
    question: str
    choices: list[str]
    answer: str | None  # the text of the true option; None where the dataset has no answers
    row: dict  # the row as it was read
    location: str  # file and row, for messages
    problem: str = ""  # why the row cannot be used
    thought: str = ""  # what to think before the answer, for train_sft.py --prompt think
    by_name: bool = False  # the clip was found by its file name alone


# ---------------------------------------------------------------- rows


def load_examples(path: str, audio_dir: str = "", for_training: bool = True) -> tuple[list[Example], str]:
    """Examples of a JSON list or JSON Lines file, and the SHA-256 of the file as it was read.

    Raises BadInput at the first row that cannot be used; in evaluation such a row is kept, with its problem.
    Clips are looked for in `audio_dir`, or beside the file; whether they exist is `check_audio`'s business.
    """
    rows, digest = read_rows(path)
    examples = []
    for row, location in rows:
        try:
            with blame(location):
                example = to_example(row, location, audio_dir or os.path.dirname(path))
                if for_training:
                    check_answer(example)
        except BadInput as error:
            if for_training:
                raise
            example = Example("", "", [], None, row if isinstance(row, dict) else {}, location, str(error))
        examples.append(example)
    if all(example.problem for example in examples):
        raise BadInput(examples[0].problem)
    return examples, digest


def check_answer(example: Example) -> None:
    """Raise BadInput unless the answer is one of the options, as training needs it."""
    if example.answer is None:
        raise BadInput("has no answer to compare with")
    if example.answer.strip() not in [choice.strip() for choice in example.choices]:
        raise BadInput(f"answer {example.answer!r} is not among the options {example.choices}")


def read_rows(path: str) -> tuple[list[tuple[object, str]], str]:
    """Rows with their locations, and the SHA-256 of the file.

    (row, "file:line") of JSON Lines, (row, "file: row n") of a JSON list.
    """
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise BadInput(f"{path}: cannot be read as text ({reason})") from None
    rows, first = [], 1
    try:
        if text.lstrip().startswith("["):
            rows = [(row, f"{path}: row {n}") for n, row in enumerate(json.loads(text), 1)]
        else:
            for first, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append((json.loads(line), f"{path}:{first}"))
    except (ValueError, RecursionError) as error:
        location = f"{path}:{first + getattr(error, 'lineno', 1) - 1}"
        reason = f"{getattr(error, 'msg', error)}; a JSON list or one JSON object a line is read"
        raise BadInput(f"{location}: not JSON ({reason})") from None
    if not rows:
        raise BadInput(f"{path}: holds no rows")
    return rows, hashlib.sha256(content).hexdigest()


def to_example(row: object, location: str, folder: str) -> Example:
    """One row of any known dataset. Raises BadInput with the reason."""
    if not isinstance(row, dict):
        raise BadInput("not a JSON object")
    # AVQA's answers are indices, and its questions say "video"
    is_avqa = "multi_choice" in row or "question_text" in row
    question_key, choices_key = ("question_text", "multi_choice") if is_avqa else ("question", "choices")
    question, choices = row.get(question_key), row.get(choices_key)
    if not isinstance(question, str) or not question.strip():
        raise BadInput(f"no question (key '{question_key}')")
    if not isinstance(choices, list) or len(choices) < 2:
        raise BadInput(f"no list of at least two options (key '{choices_key}')")
    for n, choice in enumerate(choices, 1):
        if isinstance(choice, bool) or not isinstance(choice, (str, int, float)) or not str(choice).strip():
            raise BadInput(f"option {n} is not text: {choice!r}")
    choices = [str(choice) for choice in choices]
    thought = row["thought"] if isinstance(row.get("thought"), str) else ""
    text = "\n".join([question, *choices, thought])
    text.encode()  # which half of a surrogate pair does not survive
    if special := re.search(r"<\|\w+\|>", text):
        raise BadInput(f"the text holds the special token {special[0]}")

    if is_avqa:
        question = question.replace("video", "audio")
    answer = None if row.get("answer") == "" else row.get("answer")  # as in MMAU's Test
    if is_avqa and answer is not None:
        answer = choice_at(answer, choices)
    answer = None if answer is None else str(answer)
    audio, by_name = find_clip(row, folder)
    return Example(audio, question, choices, answer, row, location, thought=thought, by_name=by_name)


def choice_at(answer: object, choices: list):
    """The option that an answer of AVQA's is the index of. Raises BadInput for any other answer."""
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise BadInput(f"answer must be an index from 0 to {len(choices) - 1}, not {answer!r}")
    return choices[answer]


def find_clip(row: dict, folder: str) -> tuple[str, bool]:
    """Path of a row's clip, and whether only its file name led there.

    The first of its likely names that exists, else the likeliest.
    """
    key = next((key for key in ("audio", "audio_path", "audio_id", "video_name") if key in row), None)
    name = row.get(key)
    if not isinstance(name, str) or not name.strip():
        raise BadInput("no audio (key 'audio', 'audio_path', 'audio_id' or 'video_name')")
    if key == "video_name":  # original AVQA: `<youtube id>_<start in six digits>`; clips have various names
        video, _, start = name.rpartition("_")
        stems = f"{video}_{start.lstrip('0') or 0}", name, f"{video}_000000"
        names = [f"{stem}.{kind}" for kind in ("wav", "flac", "mp3", "ogg") for stem in stems]
    else:
        names = [name, os.path.basename(name)]
    paths = [os.path.normpath(os.path.join(folder, name)) for name in names]
    found = next((path for path in paths if os.path.isfile(path)), paths[0])
    return found, key != "video_name" and found != paths[0]


def check_audio(examples: list[Example], skip: bool = False) -> int:
    """How many clips do not exist. Raises BadInput if any is missing; with `skip` only if all are."""
    missing = [example for example in examples if not example.problem and not os.path.isfile(example.audio)]
    if missing and not (skip and len(missing) < len(examples)):
        more = f" ({len(missing)} of {len(examples)} clips are missing)" if len(missing) > 1 else ""
        first = f"{missing[0].location}: no audio file {missing[0].audio}"
        raise BadInput(f"{first}{more}; is --audio_dir right?")
    return len(missing)


def stream_indices(n: int, seed: int, start: int, count: int) -> list[int]:
    """Entries start..start+count-1 of an endless stream of row indices, each epoch a new permutation."""
    where = [divmod(k, n) for k in range(start, start + count)]
    return [int(np.random.default_rng((seed, epoch)).permutation(n)[i]) for epoch, i in where]


# ---------------------------------------------------------------- prompts and audio


def question_text(example: Example, prompt: str) -> str:
    """What is asked, without the chat around it."""
    return PROMPTS[prompt].format(question=example.question, choices=example.choices)


def check_prompt(processor, example: Example, prompt: str) -> None:
    """Raise BadInput for a question that is too long, or has a placeholder of audio in it."""
    text = question_text(example, prompt)
    if processor.audio_token in text:
        raise BadInput(f"the text holds the special token {processor.audio_token}")
    tokens = len(processor.tokenizer(text)["input_ids"])
    if tokens > MOST_TOKENS:
        raise BadInput(f"the question has {tokens} tokens, and {MOST_TOKENS} are the most")


def chat_text(processor, example: Example, prompt: str) -> str:
    """The prompt in the model's chat template, up to where the answer begins."""
    content = [{"type": "audio", "audio_url": example.audio}]
    content += [{"type": "text", "text": question_text(example, prompt)}]
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def open_audio(path: str, content: bytes | None = None) -> soundfile.SoundFile:
    """Open a clip, reading its header only. Raises BadInput if it is no sound, under 0.1 s, or cut short.

    content: the clip's bytes, where `path` is but a name for messages.
    """
    if content is None and not os.path.isfile(path):
        raise BadInput(f"{path}: no such audio file")
    try:
        file = soundfile.SoundFile(path if content is None else io.BytesIO(content))
    except (soundfile.LibsndfileError, OSError, TypeError) as error:  # TypeError: a name that ends in .raw
        raise BadInput(f"{path}: cannot be read as audio ({getattr(error, 'error_string', error)})") from None
    # libsndfile's log tells what its numbers hide; of 2 GiB and more the writer could not know the size
    stated = re.search(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info)
    cut = stated and int(stated[2]) < 0.9 * int(stated[1]) < 1.9e9
    if cut or "lacks an end-of-stream bit" in file.extra_info:
        raise BadInput(f"{path}: is cut short ({file.frames / file.samplerate:.1f} s are left)")
    if not 1_000 <= file.samplerate <= 768_000:
        raise BadInput(f"{path}: has {file.samplerate} Hz, and 1,000 to 768,000 are read")
    if file.frames < file.samplerate / 10:
        length = f"{file.frames} samples at {file.samplerate} Hz"
        raise BadInput(f"{path}: empty audio ({length}, and 0.1 s is the least)")
    return file


def load_audio(path: str, window: int | None = None) -> np.ndarray:
    """Samples (n,) float32 at 16 kHz: channel 0, as R1-AQA (not a mean), resampled by soxr.

    window: samples at 16 kHz that the model uses; of a longer clip the rest is not read, and n is window + 1.
    Raises BadInput on what `open_audio` refuses, and on samples that are missing or no sound.
    """
    with open_audio(path) as file:
        frames = file.frames
        if window is not None:  # and a second more, so that resampling does not see the cut
            frames = min(frames, file.samplerate * (window // SAMPLE_RATE + 2))
        try:
            # in blocks, for a file may have a thousand channels
            sizes = [min(1 << 16, frames - i) for i in range(0, frames, 1 << 16)]
            blocks = [file.read(size, dtype="float32", always_2d=True)[:, 0].copy() for size in sizes]
            samples = np.concatenate(blocks)
        except soundfile.LibsndfileError as error:
            raise BadInput(f"{path}: cannot be read as audio ({error.error_string})") from None
        if len(samples) < 0.9 * frames:  # a tenth, for MP3 headers are not exact
            raise BadInput(f"{path}: is cut short ({len(samples)} of {frames} samples are there)")
    wave = samples if file.samplerate == SAMPLE_RATE else soxr.resample(samples, file.samplerate, SAMPLE_RATE)
    if not np.isfinite(wave).all():
        raise BadInput(f"{path}: has samples that are not finite numbers")
    if np.abs(wave).max() > 1e6:  # 1 is full scale, and 32,768 where a writer forgot to divide
        raise BadInput(f"{path}: has samples as large as {np.abs(wave).max():.0e}, which is no sound")
    return wave if window is None else wave[: window + 1]


def make_batch(processor, examples: list[Example], waves: list[np.ndarray], prompt: str) -> dict:
    """Model inputs for B examples and their samples (n,) at 16 kHz.

    input_ids, attention_mask: (B, P), padded on the left. input_features: (B, mel bins, frames), log-mel,
    10 ms a frame, always the whole window (30 s; what is longer is cut). feature_attention_mask: (B, frames),
    1 where there is sound.
    """
    texts = [chat_text(processor, example, prompt) for example in examples]
    # `audio=`, not `audios=`: current transformers drop the old name and the model answers blind
    inputs = {"text": texts, "audio": [wave[: window(processor)] for wave in waves]}
    inputs["text_kwargs"] = {"padding": True}  # a flat padding=True would reach the audio too
    inputs["audio_kwargs"] = whole_window(processor) | {"sampling_rate": SAMPLE_RATE}
    with torch.autocast("cpu", enabled=False):  # features are fp32, whatever the model computes in
        return dict(processor(**inputs, return_tensors="pt"))


def window(processor) -> int:
    """Samples at 16 kHz of a clip that the model hears, at most 30 s."""
    return min(WINDOW, processor.feature_extractor.n_samples)


def whole_window(processor) -> dict:
    """Arguments that pad a clip to the window, not to Omni's 300 s, and not to the longest clip beside it."""
    return {"padding": "max_length", "max_length": window(processor)}


def is_cut(processor, wave: np.ndarray) -> bool:
    """Whether a clip is longer than the model hears."""
    return len(wave) > window(processor)


@dataclass
class Batch:
    """The prompts of a step on this process."""

    first: int  # index of the first prompt in the run's stream of prompts
    examples: list[Example]
    inputs: dict  # of the model, see make_batch
    metrics: dict  # of the clips


def read_clip(processor, example: Example, prompt: str) -> np.ndarray:
    """The samples of an example, as far as the model uses them. Raises BadInput with the location."""
    if example.problem:
        raise BadInput(example.problem)
    with blame(example.location):
        check_prompt(processor, example, prompt)
        return load_audio(example.audio, window(processor))


def read_batch(processor, examples: list[Example], config, first: int, B: int) -> Batch:
    """B prompts of the stream. With --skip_bad_audio the next row replaces a bad one; else it is refused."""
    batch, waves, skipped = [], [], 0
    for i in stream_indices(len(examples), config.seed, first, B):
        for k in range(len(examples)):  # the row itself, or the next that can be read
            example = examples[(i + k) % len(examples)]
            try:
                waves.append(read_clip(processor, example, config.prompt))
                break
            except BadInput as error:
                if not config.skip_bad_audio or k == len(examples) - 1:  # then no row can be read
                    raise
                skipped += 1
                tqdm.write(printable(f"skipped: {error}"))
        batch.append(example)
    inputs = make_batch(processor, batch, waves, config.prompt)
    cut = sum(is_cut(processor, wave) for wave in waves)
    return Batch(first, batch, inputs, {"clips_cut": cut / B, "clips_skipped": skipped / B})


def made_ahead(make, items) -> Iterator:
    """make(item) for each item; a thread makes the next one while the one before is in use."""
    job = None
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            before, job = job, thread.submit(make, item)
            if before:
                yield before.result()
        if job:
            yield job.result()


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
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_whole(path: str, content: str | bytes | Iterable[str]) -> None:
    """Write a file that is there whole or not at all. Raises BadInput where it cannot be written."""
    parts = [content] if isinstance(content, (str, bytes)) else content
    try:
        with open(f"{path}.partial", "wb") as file:
            for part in parts:
                # half a surrogate pair, which JSON can hold and UTF-8 cannot, is written as JSON escapes it
                file.write(part if isinstance(part, bytes) else part.encode("utf-8", "backslashreplace"))
        os.replace(f"{path}.partial", path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from None


def read_log(path: str) -> Iterator:
    """Values of a file to which lines of JSON are appended; a kill may have left half a line in it."""
    with suppress(FileNotFoundError), open(path) as log:
        for line in log:
            with suppress(ValueError):
                yield json.loads(line)


def write_rows(path: str, rows: Iterable) -> None:
    """Write rows as JSON Lines, whole or not at all."""
    write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def lock_folder(path: str) -> FileLock:
    """Make a folder for results; others are kept out while the lock is referred to and this process lives."""
    lock = FileLock(os.path.join(path, LOCK), is_singleton=True)
    try:
        os.makedirs(path, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(f"--output {path}: another run is at work in it") from None
    except OSError as error:
        raise BadInput(f"--output {path or repr('')}: cannot be written ({error.strerror})") from None
    return lock
