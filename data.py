"""Questions about sounds: rows of the supported datasets, the three prompts, audio, batches.

A row of any of these datasets becomes one `Example`; anything else is rejected with file, row and reason:

    your JSON Lines      audio       question       choices       answer: the option's text
    AVQA, from R1-AQA    audio_path  question_text  multi_choice  answer: an index
    AVQA, original       video_name  question_text  multi_choice  answer: an index
    MMAU                 audio_id    question       choices       answer: text (Test has none)
    MMAR                 audio_path  question       choices       answer: text
"""

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from cli import BadInput, located, printable

SAMPLE_RATE = 16_000  # Hz; the front ends of all supported models take this rate
MAX_WINDOW = 30 * SAMPLE_RATE  # samples; longer clips are cut
MAX_QUESTION_TOKENS = 4_096  # of a question with its options; MMAU's have about 50
LOCK = ".lock"  # file in an output folder

STEM = "{question} Please choose the answer from the following options: {choices}."
PROMPTS = {  # R1-AQA's prompts 1 to 3; {choices} is the Python list, as upstream prints it
    "plain": STEM,
    "answer": STEM + " Output the final answer in <answer> </answer>.",
    "think": STEM
    + " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
}


@dataclass
class Example:
    audio: str  # path of the clip
    question: str
    choices: list[str]
    answer: str | None  # the text of the correct option; None if the dataset has no answers
    row: dict  # the row as it was read
    location: str  # file and row, for messages
    problem: str = ""  # why the row cannot be used
    thought: str = ""  # the reasoning to imitate, for train_sft.py --prompt think
    found_by_name: bool = False  # the clip was not at its path, but a file with the same name was found


# ---------------------------------------------------------------- rows


def load_examples(path: str, audio_dir: str = "", for_training: bool = True) -> tuple[list[Example], str]:
    """Examples from a JSON list or JSON Lines file, and the SHA-256 of the file.

    Training raises BadInput at the first row that cannot be used; evaluation keeps such a row, with its
    problem. Clips are looked up in `audio_dir`, or next to the file; `check_audio` tests whether they exist.
    """
    rows, digest = read_rows(path)
    folder = audio_dir or os.path.dirname(path)
    examples = []
    for row, location in rows:
        try:
            with located(location):
                example = to_example(row, location, folder)
                if for_training:
                    check_answer(example)
        except BadInput as error:
            if for_training:
                raise
            kept = row if isinstance(row, dict) else {}
            example = Example("", "", [], None, kept, location, problem=str(error))
        examples.append(example)
    if all(example.problem for example in examples):
        raise BadInput(examples[0].problem)
    return examples, digest


def read_rows(path: str) -> tuple[list[tuple[object, str]], str]:
    """Rows from a JSON list or JSON Lines file, each with its location, and the SHA-256 of the file."""
    with located(path):
        content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    rows = []
    if text.lstrip().startswith("["):
        with located(f"{path}: not a JSON list"):
            values = json.loads(text)
        for number, row in enumerate(values, 1):
            rows.append((row, f"{path}: row {number}"))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                with located(f"{path}:{number}: not JSON (expected a JSON list or one JSON object per line)"):
                    rows.append((json.loads(line), f"{path}:{number}"))
    if not rows:
        raise BadInput(f"{path}: contains no rows")
    return rows, hashlib.sha256(content).hexdigest()


def to_example(row: object, location: str, folder: str) -> Example:
    """Convert one row of any supported dataset. Raises BadInput with the reason."""
    if not isinstance(row, dict):
        raise BadInput("not a JSON object")

    is_avqa = "multi_choice" in row or "question_text" in row
    question_key = "question_text" if is_avqa else "question"
    choices_key = "multi_choice" if is_avqa else "choices"
    question = row.get(question_key)
    choices = row.get(choices_key)
    if not isinstance(question, str) or not question.strip():
        raise BadInput(f"no question (key '{question_key}')")
    if not isinstance(choices, list) or len(choices) < 2:
        raise BadInput(f"no list of at least two options (key '{choices_key}')")
    for number, choice in enumerate(choices, 1):
        is_text = isinstance(choice, (str, int, float)) and not isinstance(choice, bool)
        if not is_text or not str(choice).strip() or choice != choice:  # nan does not equal itself
            raise BadInput(f"option {number} is not text: {choice!r}")
    choices = [as_shown(str(choice)) for choice in choices]

    thought = row.get("thought")
    if not isinstance(thought, str):
        thought = ""
    "\n".join([question, *choices, thought]).encode()  # a lone surrogate raises

    answer = row.get("answer") if has_answer(row) else None
    if answer is not None:
        answer = choice_at(answer, choices) if is_avqa else as_shown(str(answer))
    if is_avqa:
        question = question.replace("video", "audio")  # as R1-AQA does
    audio, found_by_name = find_clip(row, folder)
    return Example(audio, question, choices, answer, row, location, "", thought, found_by_name)


def as_shown(option: str) -> str:
    """An option that a model can repeat. Raises BadInput for characters that the prompt shows as escapes.

    The prompt contains the options as a Python list, where a non-breaking space or a tab is an escape, but
    the reward compares characters. So whitespace becomes plain spaces.
    """
    option = re.sub(r"\s", " ", option)
    for character in option:
        if not character.isprintable():
            raise BadInput(f"an option contains the invisible character U+{ord(character):04X}: {option!r}")
    return option


def has_answer(row: dict) -> bool:
    """Whether a row has an answer: not missing, null, empty (as in MMAU's Test), or nan (from pandas)."""
    answer = row.get("answer")
    return answer is not None and answer != "" and answer == answer


def choice_at(index: object, choices: list):
    """The option at an index, which is how AVQA gives its answers. Raises BadInput for anything else."""
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise BadInput(f"answer must be an index from 0 to {len(choices) - 1}, not {index!r}")
    return choices[index]


def check_answer(example: Example) -> None:
    """Raise BadInput unless the answer is one of the options, as training requires."""
    if example.answer is None:
        raise BadInput("has no answer to compare with")
    if example.answer.strip() not in [choice.strip() for choice in example.choices]:
        raise BadInput(f"answer {example.answer!r} is not among the options {example.choices}")


def find_clip(row: dict, folder: str) -> tuple[str, bool]:
    """Path of a row's clip, and whether it was found by its file name alone.

    Returns the first candidate that exists, else the most likely one.
    """
    keys = [key for key in ("audio", "audio_path", "audio_id", "video_name") if key in row]
    name = row[keys[0]] if keys else None
    if not isinstance(name, str) or not name.strip():
        raise BadInput("no audio (key 'audio', 'audio_path', 'audio_id' or 'video_name')")

    if keys[0] == "video_name":
        # original AVQA: `<youtube id>_<start in six digits>`; people name the clips in various ways
        video, _, start = name.rpartition("_")
        stems = [f"{video}_{start.lstrip('0') or 0}", name, f"{video}_000000"]
        names = [f"{stem}.{extension}" for extension in ("wav", "flac", "mp3", "ogg") for stem in stems]
    else:
        names = [name, os.path.basename(name)]
    # not os.path.normpath, which removes `..` together with the name before it, even if that is a link
    paths = [str(Path(folder, name)) for name in names]
    for path in paths:
        if os.path.isfile(path):
            return path, keys[0] != "video_name" and path != paths[0]
    return paths[0], False


def check_audio(examples: list[Example], skip: bool = False) -> int:
    """Count missing clips. Raises BadInput if any is missing; with `skip` only if all are."""
    usable = [example for example in examples if not example.problem]
    missing = [example for example in usable if not os.path.isfile(example.audio)]
    if missing and not (skip and len(missing) < len(examples)):
        count = f" ({len(missing)} of {len(examples)} clips are missing)" if len(missing) > 1 else ""
        raise BadInput(
            f"{missing[0].location}: no audio file {missing[0].audio}{count}; is --audio_dir right?"
        )
    return len(missing)


def locations(examples: list[Example]) -> str:
    """Where the examples of a batch come from, for messages."""
    return ", ".join(example.location for example in examples)


# ---------------------------------------------------------------- prompts


def question_text(example: Example, prompt: str) -> str:
    """The question with its options and instructions, without the chat template."""
    return PROMPTS[prompt].format(question=example.question, choices=example.choices)


def check_prompt(processor, example: Example, prompt: str) -> None:
    """Raise BadInput for a question that is too long, or a text that contains a special token."""
    tokenizer = processor.tokenizer
    tokens = len(tokenizer(question_text(example, prompt))["input_ids"])
    if tokens > MAX_QUESTION_TOKENS:
        raise BadInput(f"the question has {tokens} tokens; the limit is {MAX_QUESTION_TOKENS}")
    # only text from the row: for some tokenizers the prompt's <think> is a token as well
    text = "\n".join([example.question, *example.choices, example.thought])
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token in processor.special_ids:
            raise BadInput(f"the text contains the special token {tokenizer.convert_ids_to_tokens(token)}")


def chat_text(processor, example: Example, prompt: str) -> str:
    """The prompt in the model's chat template, up to where the answer begins."""
    audio = {"type": "audio", "audio_url": example.audio}
    text = {"type": "text", "text": question_text(example, prompt)}
    chat = [{"role": "user", "content": [audio, text]}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


# ---------------------------------------------------------------- audio

# XING: an MP3 frame with the length of the file. JOINT: the start of the next file, in files joined together
XING_PATTERN = rb"\xff[\xe2-\xff]..\0{9}(?:\0{8}|\0{23})?(?:Xing|Info)"
XING = re.compile(XING_PATTERN, re.DOTALL)
JOINT = re.compile(rb"OggS\0[\2\6]|" + XING_PATTERN, re.DOTALL)


class AudioStream(soundfile.SoundFile):
    """A clip, read until its decoder stops: headers can claim too few, too many, or 2^63 samples.

    source: the bytes, as a file.
    """

    def __init__(self, source):
        self.source = source
        super().__init__(source)

    def close(self) -> None:
        super().close()
        self.source.close()

    def seekable(self) -> bool:
        return False  # otherwise soundfile would stop where the header says

    def read_channel(self, channel: int, limit: float) -> np.ndarray:
        """Samples (n,) float32 of one channel, at most `limit`."""
        blocks = [np.zeros(0, np.float32)]
        count = 0
        while count < limit:
            block = self.read(1 << 16, dtype="float32", always_2d=True)  # a file may have a thousand channels
            if len(block) == 0:
                break
            blocks.append(block[:, channel].copy())
            count += len(block)
        samples = np.concatenate(blocks)
        return samples if count <= limit else samples[: int(limit)]

    def seconds(self) -> float | None:
        """The length that the header claims; None if it claims none."""
        return self.frames / self.samplerate if self.frames < 2**62 else None


def open_audio(path: str, content: bytes | None = None) -> AudioStream:
    """Open a clip and read its header. Raises BadInput if it is not audio, under 0.1 s, or cut short.

    content: the clip's bytes; then `path` is only used in messages.
    """
    if content is None and not os.path.isfile(path):
        raise BadInput(f"{path}: no such audio file")
    with located(path):
        source = open(path, "rb") if content is None else io.BytesIO(content)
        start = source.read(10)
        source.seek(0)
        if start[:3] == b"ID3":  # a tag before the audio, which libsndfile would count as audio
            tag_size = 10 + sum(byte << shift for byte, shift in zip(start[6:], (21, 14, 7, 0)))
            source = io.BytesIO(source.read()[tag_size:])
        try:
            file = AudioStream(source)
        except soundfile.LibsndfileError as error:
            raise BadInput(f"cannot be read as audio ({error.error_string})") from None
        # libsndfile repairs a size that is too large and reports it only in its log. Sizes near 2 or 4 GiB
        # come from a writer that could not know the length, such as one writing to a pipe
        claim = re.search(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info)
        if claim and int(claim[2]) < 0.9 * int(claim[1]) < 1.9e9:
            raise BadInput(f"is cut short ({file.frames / file.samplerate:.1f} s remain)")
        if file.frames < 0.1 * file.samplerate:
            raise BadInput(f"is empty ({file.frames} samples at {file.samplerate} Hz; the minimum is 0.1 s)")
    return file


def decode_audio(path: str, content: bytes | None, channel: int, max_seconds: float):
    """Samples (n,) of one channel and their rate in Hz. content: see open_audio."""
    with open_audio(path, content) as file, located(path):
        rate = file.samplerate
        limit = rate * max_seconds
        samples = file.read_channel(channel, limit)
        if len(samples) >= limit:
            return samples, rate

        # the decoder has ended: was that the end of the file?
        seconds = len(samples) / rate
        if file.format not in ("MP3", "OGG"):
            if file.seconds() is not None and len(samples) < 0.9 * file.frames:
                raise BadInput(f"is cut short ({seconds:.1f} of {file.seconds():.1f} s remain)")
            return samples, rate
        position = file.source.tell()
        file.source.seek(0)
        content = file.source.read()
        unread = content[position:]

        joint = JOINT.search(content, 1000) if unread else None  # in a file that was joined from several
        if joint is None:
            if file.format == "OGG":
                cut_short = "Junk after the last page" in file.extra_info  # half a page
            else:
                cut_short = XING.match(content) and len(samples) < 0.9 * file.frames
            if cut_short:
                raise BadInput(f"is cut short ({seconds:.1f} s remain)")
            if unread.count(content[:2]) > 3:  # more frames, which libsndfile does not decode
                raise BadInput(f"only its first {seconds:.1f} s can be decoded: re-encode it")
            return samples, rate
        rest, rest_rate = decode_audio(path, content[joint.start() :], channel, max_seconds - seconds)
        if rest_rate != rate:
            raise BadInput(f"is joined from parts of {rate} and {rest_rate} Hz: re-encode it")
        return np.concatenate([samples, rest]), rate


def load_audio(path: str, window: int | None = None, channel: int = 0) -> np.ndarray:
    """Samples (n,) float32 at 16 kHz: channel 0, as in R1-AQA (not the mean), resampled by soxr.

    window: number of samples at 16 kHz that the model uses. A longer clip is read only that far, and n is
    then window + 1. Raises BadInput if the clip cannot be read.
    """
    # one second more than the window, so that resampling is not affected by the cut
    max_seconds = math.inf if window is None else window // SAMPLE_RATE + 2
    wave, rate = decode_audio(path, None, channel, max_seconds)
    if not np.isfinite(wave).all():
        raise BadInput(f"{path}: has samples that are nan or inf")
    if rate != SAMPLE_RATE:
        wave = soxr.resample(wave, rate, SAMPLE_RATE)
    return wave if window is None else wave[: window + 1]


def is_silent(wave: np.ndarray) -> bool:
    """Whether a clip is digital silence, or below the lowest bit of 16-bit audio."""
    return np.abs(wave).max(initial=0) < 2**-15


def window_size(processor) -> int:
    """The model's window in samples at 16 kHz, at most 30 s."""
    return min(MAX_WINDOW, processor.feature_extractor.n_samples)


def window_padding(processor) -> dict:
    """Arguments that pad a clip to the window: not to Omni's 300 s, nor to the longest clip of the batch."""
    return {"padding": "max_length", "max_length": window_size(processor)}


def is_cut(processor, wave: np.ndarray) -> bool:
    """Whether a clip is longer than the model's window."""
    return len(wave) > window_size(processor)


# ---------------------------------------------------------------- batches


@dataclass
class Batch:
    """The prompts of a step on this process."""

    first: int  # index of the first prompt in the run's stream of prompts
    examples: list[Example]
    inputs: dict  # model inputs, see make_inputs
    metrics: dict  # of the clips


def make_inputs(processor, examples: list[Example], waves: list[np.ndarray], prompt: str) -> dict:
    """Model inputs for B examples and their samples (n,) at 16 kHz.

    input_ids, attention_mask: (B, P), padded on the left. input_features: (B, mel bins, frames), log-mel,
    10 ms per frame, always the full window (30 s; longer clips are cut). feature_attention_mask: (B, frames),
    0 on padding.
    """
    text = [chat_text(processor, example, prompt) for example in examples]
    audio = [wave[: window_size(processor)] for wave in waves]
    with torch.autocast("cpu", enabled=False):  # features are fp32, whatever the model computes in
        inputs = processor(
            text=text,
            # not `audios=`: current transformers ignores the old name, and the model would get no audio
            audio=audio,
            # not a flat `padding=True`, which would apply to the audio too
            text_kwargs={"padding": True},
            audio_kwargs={"sampling_rate": SAMPLE_RATE, **window_padding(processor)},
            return_tensors="pt",
        )
    return dict(inputs)


def read_clip(processor, example: Example, prompt: str) -> np.ndarray:
    """Read as much of an example's clip as the model needs. Raises BadInput with the location."""
    if example.problem:
        raise BadInput(example.problem)
    with located(example.location):
        check_prompt(processor, example, prompt)
        return load_audio(example.audio, window_size(processor))


def read_batch(processor, examples: list[Example], config, first: int, count: int) -> Batch:
    """Entries first..first+count-1 of the stream of prompts.

    A row that cannot be read raises BadInput; with --skip_bad_audio the next row takes its place.
    """
    batch = []
    waves = []
    skipped = 0
    for i in stream_indices(len(examples), config.seed, first, count):
        for offset in range(len(examples)):
            example = examples[(i + offset) % len(examples)]
            try:
                wave = read_clip(processor, example, config.prompt)
                break
            except BadInput as error:
                tried_all = offset == len(examples) - 1
                if not config.skip_bad_audio or tried_all:
                    raise
                skipped += 1
                tqdm.write(printable(f"skipped: {error}"))
        batch.append(example)
        waves.append(wave)
    inputs = make_inputs(processor, batch, waves, config.prompt)
    metrics = {
        "clips_cut": sum(is_cut(processor, wave) for wave in waves) / count,
        "clips_silent": sum(is_silent(wave) for wave in waves) / count,
        "clips_skipped": skipped / count,
    }
    return Batch(first, batch, inputs, metrics)


def stream_indices(n: int, seed: int, start: int, count: int) -> list[int]:
    """Entries start..start+count-1 of an endless stream of row indices; each epoch is a new permutation."""
    indices = []
    for k in range(start, start + count):
        epoch, position = divmod(k, n)
        indices.append(int(np.random.default_rng((seed, epoch)).permutation(n)[position]))
    return indices


def prefetch(make, items) -> Iterator:
    """make(item) for each item; a thread prepares the next one while the current one is in use."""
    pending = None
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            current, pending = pending, thread.submit(make, item)
            if current:
                yield current.result()
        if pending:
            yield pending.result()


def select_rows(inputs: dict, rows: slice) -> dict:
    """Some prompts of a batch, without the left padding that only the others need."""
    part = {name: value[rows] for name, value in inputs.items()}
    first = part["attention_mask"].any(0).long().argmax()  # the first column that is not all padding
    for name in ("input_ids", "attention_mask"):
        part[name] = part[name][:, first:]
    return part


def decode(processor, eos_ids: list[int], ids: torch.Tensor, mask: torch.Tensor) -> list[list[str]]:
    """Texts [B][G] of completions (B, G, T) without the final EOS; other special tokens stay visible."""
    texts = []
    for group, group_mask in zip(ids.cpu(), mask.cpu()):
        texts.append([])
        for completion, completion_mask in zip(group, group_mask):
            tokens = completion[completion_mask].tolist()
            tokens = [token for token in tokens if token not in eos_ids]
            texts[-1].append(processor.tokenizer.decode(tokens))
    return texts


# ---------------------------------------------------------------- files


def write_atomically(path: str, content: str | bytes | Iterable[str]) -> None:
    """Write a file under a temporary name, then rename it, so that no reader ever sees half a file."""
    parts = [content] if isinstance(content, (str, bytes)) else content
    with located(f"{path}: cannot be written"):
        with open(f"{path}.partial", "wb") as file:
            for part in parts:
                # JSON can contain a lone surrogate, UTF-8 cannot: write it the way JSON escapes it
                file.write(part if isinstance(part, bytes) else part.encode("utf-8", "backslashreplace"))
        os.replace(f"{path}.partial", path)


def write_rows(path: str, rows: Iterable) -> None:
    """Write rows as JSON Lines, atomically."""
    write_atomically(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def lock_folder(path: str) -> FileLock:
    """Create an output folder and lock it for as long as this process keeps the returned lock."""
    lock = FileLock(os.path.join(path, LOCK), is_singleton=True)
    with located(f"--output {path or repr('')}"):
        os.makedirs(path, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BadInput("another run is using this folder") from None
    return lock
