"""Questions about sounds: rows of the known datasets, the three prompts, audio, batches.

A row of any of these becomes one `Example`; anything else is refused with file, row and reason:

    own JSONL            audio       question       choices       answer: the option's text
    AVQA, as R1-AQA has  audio_path  question_text  multi_choice  answer: an index
    AVQA, original       video_name  question_text  multi_choice  answer: an index
    MMAU                 audio_id    question       choices       answer: text (Test has none)
    MMAR                 audio_path  question       choices       answer: text
"""

import json
import os
import re
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr
import torch

SAMPLE_RATE = 16_000  # Hz, what the Whisper front end of Qwen2-Audio hears
STEM = "{question} Please choose the answer from the following options: {choices}."
PROMPTS = {  # R1-AQA's prompts 1 to 3; {choices} is the Python list, as upstream prints it
    "plain": STEM,
    "answer": STEM + " Output the final answer in <answer> </answer>.",
    "think": STEM + " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
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
    place: str  # file and row, for messages


# ---------------------------------------------------------------------------------------------------- rows


def load_examples(path: str, audio_dir: str | None = None, need_answers: bool = True) -> list[Example]:
    """Read a JSON list or JSON Lines file. Raises BadInput at the first row that cannot be used.

    Clips are looked for in `audio_dir`, or beside the file; whether they exist is `check_audio`'s business.
    """
    folder = audio_dir or os.path.dirname(path)
    examples = [to_example(row, place, folder) for row, place in read_rows(path)]
    if not examples:
        raise BadInput(f"{path}: holds no rows")
    for example in examples:
        if need_answers and example.answer is None:
            raise BadInput(f"{example.place}: has no answer to compare with")
    return examples


def read_rows(path: str) -> list[tuple[object, str]]:
    """Rows with their places: (row, "file:line") of JSON Lines, (row, "file: row n") of a JSON list."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as text ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    try:
        if text.lstrip().startswith("["):
            return [(row, f"{path}: row {n}") for n, row in enumerate(json.loads(text), 1)]
        rows = []
        for first, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append((json.loads(line), f"{path}:{first}"))
        return rows
    except json.JSONDecodeError as error:
        line = error.lineno if text.lstrip().startswith("[") else first
        raise BadInput(f"{path}:{line}: not JSON ({error.msg}); a JSON list or one JSON object a line is read") from None


def to_example(row: object, place: str, folder: str) -> Example:
    """One row of any known dataset. Raises BadInput with the place and the reason."""

    def refuse(reason):
        raise BadInput(f"{place}: {reason}")

    if not isinstance(row, dict):
        refuse("not a JSON object")
    is_avqa = "multi_choice" in row  # AVQA's answers are indices, and its questions say "video"
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
    elif str(answer).strip() not in [choice.strip() for choice in choices]:
        refuse(f"answer {answer!r} is not among the options {choices}")
    return Example(find_clip(row, place, folder), question, choices, None if answer is None else str(answer), row, place)


def find_clip(row: dict, place: str, folder: str) -> str:
    """Path of a row's clip: the first of its likely places that exists, else the likeliest."""
    key = next((key for key in ("audio", "audio_path", "audio_id", "video_name") if key in row), None)
    name = row.get(key)
    if not isinstance(name, str) or not name.strip():
        raise BadInput(f"{place}: no audio (key 'audio', 'audio_path', 'audio_id' or 'video_name')")
    if key == "video_name":  # original AVQA: `<youtube id>_000030`, extracted under one of several names
        video = name.rsplit("_", 1)[0]
        names = [f"{stem}.{kind}" for kind in ("wav", "flac", "mp3", "ogg") for stem in (f"{video}_30", name, f"{video}_000000")]
    else:
        names = [name, os.path.basename(name)]
    paths = [os.path.normpath(os.path.join(folder, name)) for name in names]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def check_audio(examples: list[Example]) -> None:
    """Raise BadInput if a clip does not exist: better now than hours into a run."""
    missing = [example for example in examples if not os.path.isfile(example.audio)]
    if missing:
        more = f" ({len(missing)} of {len(examples)} clips are missing)" if len(missing) > 1 else ""
        raise BadInput(f"{missing[0].place}: no audio file {missing[0].audio}{more}; is --audio_dir right?")


def stream_indices(n: int, seed: int, start: int, count: int) -> list[int]:
    """Places start..start+count-1 of an endless stream over n rows: epoch after epoch, each a permutation of its own."""
    return [int(np.random.default_rng((seed, k // n)).permutation(n)[k % n]) for k in range(start, start + count)]


# ------------------------------------------------------------------------------------------- prompts and audio


def chat_text(processor, example: Example, prompt: str) -> str:
    """The prompt in the model's chat template, up to where the answer begins."""
    question = PROMPTS[prompt].format(question=example.question, choices=example.choices)
    content = [{"type": "audio", "audio_url": example.audio}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)


def load_audio(path: str) -> np.ndarray:
    """Samples (n,) float32 at 16 kHz: channel 0, as R1-AQA (not a mean), resampled by soxr.

    Raises BadInput on what is no sound: unreadable, shorter than 0.1 s, samples not finite.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise BadInput(f"{path}: cannot be read as audio ({getattr(error, 'error_string', error)})") from None
    wave = samples[:, 0] if rate == SAMPLE_RATE else soxr.resample(samples[:, 0], rate, SAMPLE_RATE)
    if len(wave) < SAMPLE_RATE // 10:
        raise BadInput(f"{path}: empty audio ({len(samples)} samples at {rate} Hz, and 0.1 s is the least)")
    if not np.isfinite(wave).all():
        raise BadInput(f"{path}: has samples that are not finite numbers")
    return wave


def make_batch(processor, examples: list[Example], prompt: str) -> tuple[dict, int]:
    """Model inputs for B examples, and how many of the clips are longer than the model hears (30 s; the rest is cut).

    input_ids, attention_mask: (B, P), padded on the left. input_features: (B, mel bins, frames), log-mel, 10 ms a
    frame, always the whole window. feature_attention_mask: (B, frames), 1 where there is sound.
    """
    waves = [load_audio(example.audio) for example in examples]
    texts = [chat_text(processor, example, prompt) for example in examples]
    # `audio=`, not `audios=`: current transformers drop the old name and the model answers blind
    inputs = processor(text=texts, audio=waves, sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt")
    return dict(inputs), sum(len(wave) > processor.feature_extractor.n_samples for wave in waves)


def take(inputs: dict, rows: slice) -> dict:
    """Some prompts of a batch, without the padding that only the others needed."""
    part = {name: value[rows] for name, value in inputs.items()}
    left = part["attention_mask"].any(0).long().argmax()
    return part | {name: part[name][:, left:] for name in ("input_ids", "attention_mask")}


def eos_tokens(model, processor) -> list[int]:
    """Every id that ends a completion: those of the model's generation config and the tokenizer's own."""
    ids = model.generation_config.eos_token_id
    return sorted({*(ids if isinstance(ids, list) else [ids]), processor.tokenizer.eos_token_id} - {None})


def decode(processor, eos_ids: list[int], ids: torch.Tensor, mask: torch.Tensor) -> list[list[str]]:
    """Texts [B][G] without the final EOS. Other special tokens stay visible: they are not part of an answer block."""
    return [
        [processor.tokenizer.decode([i for i in o[m].tolist() if i not in eos_ids]) for o, m in zip(group, masks)]
        for group, masks in zip(ids.cpu(), mask.cpu())
    ]
