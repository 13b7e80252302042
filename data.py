"""Questions about sounds: rows of the known datasets, the three prompts, audio, batches.

    python data.py avqa --questions train_qa.json --audio_dir vggsound --output avqa_train.jsonl     # AVQA to training rows
    python data.py check avqa_train.jsonl                             # all that is wrong with a file, before a GPU is rented

A row of any of these becomes one `Example`; anything else is refused with file, row and reason:

    own JSONL            audio       question       choices       answer: the option's text
    AVQA, as R1-AQA has  audio_path  question_text  multi_choice  answer: an index
    AVQA, original       video_name  question_text  multi_choice  answer: an index
    MMAU                 audio_id    question       choices       answer: text (Test has none)
    MMAR                 audio_path  question       choices       answer: text
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr
import torch
from tqdm import tqdm

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
    if need_answers:
        for example in examples:
            check_answer(example)
    return examples


def check_answer(example: Example) -> None:
    """Raise BadInput unless the answer is one of the options, as training needs it; a benchmark may have none."""
    if example.answer is None:
        raise BadInput(f"{example.place}: has no answer to compare with")
    if example.answer.strip() not in [choice.strip() for choice in example.choices]:
        raise BadInput(f"{example.place}: answer {example.answer!r} is not among the options {example.choices}")


def read_rows(path: str) -> list[tuple[object, str]]:
    """Rows with their places: (row, "file:line") of JSON Lines, (row, "file: row n") of a JSON list."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as text ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    rows, first = [], 1
    try:
        if text.lstrip().startswith("["):
            rows = [(row, f"{path}: row {n}") for n, row in enumerate(json.loads(text), 1)]
        else:
            for first, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append((json.loads(line), f"{path}:{first}"))
    except json.JSONDecodeError as error:
        place = f"{path}:{first + error.lineno - 1}"
        raise BadInput(f"{place}: not JSON ({error.msg}); a JSON list or one JSON object a line is read") from None
    if not rows:
        raise BadInput(f"{path}: holds no rows")
    return rows


def to_example(row: object, place: str, folder: str) -> Example:
    """One row of any known dataset. Raises BadInput with the place and the reason."""

    def refuse(reason):
        raise BadInput(f"{place}: {reason}")

    if not isinstance(row, dict):
        refuse("not a JSON object")
    is_avqa = "multi_choice" in row or "question_text" in row  # its answers are indices, and its questions say "video"
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
    return Example(find_clip(row, place, folder), question, choices, None if answer is None else str(answer), row, place)


def find_clip(row: dict, place: str, folder: str) -> str:
    """Path of a row's clip: the first of its likely places that exists, else the likeliest."""
    key = next((key for key in ("audio", "audio_path", "audio_id", "video_name") if key in row), None)
    name = row.get(key)
    if not isinstance(name, str) or not name.strip():
        raise BadInput(f"{place}: no audio (key 'audio', 'audio_path', 'audio_id' or 'video_name')")
    if key == "video_name":  # original AVQA: `<youtube id>_<start in six digits>`, extracted under one of several names
        video, _, start = name.rpartition("_")
        stems = f"{video}_{start.lstrip('0')}", name, f"{video}_000000"
        names = [f"{stem}.{kind}" for kind in ("wav", "flac", "mp3", "ogg") for stem in stems]
    else:
        names = [name, os.path.basename(name)]
    paths = [os.path.normpath(os.path.join(folder, name)) for name in names]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def check_audio(examples: list[Example], skip: bool = False) -> int:
    """How many clips do not exist. Raises BadInput if that is any, or with `skip` all: better now than hours into a run."""
    missing = [example for example in examples if not os.path.isfile(example.audio)]
    if missing and not (skip and len(missing) < len(examples)):
        more = f" ({len(missing)} of {len(examples)} clips are missing)" if len(missing) > 1 else ""
        raise BadInput(f"{missing[0].place}: no audio file {missing[0].audio}{more}; is --audio_dir right?")
    return len(missing)


def stream_indices(n: int, seed: int, start: int, count: int) -> list[int]:
    """Places start..start+count-1 of an endless stream over n rows: epoch after epoch, each a permutation of its own."""
    return [int(np.random.default_rng((seed, k // n)).permutation(n)[k % n]) for k in range(start, start + count)]


# ------------------------------------------------------------------------------------------- prompts and audio


def chat_text(processor, example: Example, prompt: str) -> str:
    """The prompt in the model's chat template, up to where the answer begins."""
    question = PROMPTS[prompt].format(question=example.question, choices=example.choices)
    content = [{"type": "audio", "audio_url": example.audio}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)


def open_audio(path: str) -> soundfile.SoundFile:
    """A clip of which only the header is read. Raises BadInput if it is no sound, shorter than 0.1 s, or cut short."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such audio file")
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:  # TypeError: a name that ends in .raw
        raise BadInput(f"{path}: cannot be read as audio ({getattr(error, 'error_string', error)})") from None
    # libsndfile's log tells what its numbers hide; sizes of 2 GiB and more are of writers that could not know
    stated = re.search(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info)
    cut = stated and int(stated[2]) < 0.9 * int(stated[1]) < 1.9e9
    if cut or "lacks an end-of-stream bit" in file.extra_info:
        raise BadInput(f"{path}: is cut short ({file.frames / file.samplerate:.1f} s are left)")
    if file.frames < file.samplerate / 10:
        raise BadInput(f"{path}: empty audio ({file.frames} samples at {file.samplerate} Hz, and 0.1 s is the least)")
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

    input_ids, attention_mask: (B, P), padded on the left. input_features: (B, mel bins, frames), log-mel, 10 ms a
    frame, always the whole window (30 s; what is longer is cut). feature_attention_mask: (B, frames), 1 where there is sound.
    """
    texts = [chat_text(processor, example, prompt) for example in examples]
    # `audio=`, not `audios=`: current transformers drop the old name and the model answers blind
    return dict(processor(text=texts, audio=waves, sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt"))


def is_cut(processor, wave: np.ndarray) -> bool:
    """Whether a clip is longer than the model hears."""
    return len(wave) > processor.feature_extractor.n_samples


def take(inputs: dict, rows: slice) -> dict:
    """Some prompts of a batch, without the padding that only the others needed."""
    part = {name: value[rows] for name, value in inputs.items()}
    left = part["attention_mask"].any(0).long().argmax()
    return part | {name: part[name][:, left:] for name in ("input_ids", "attention_mask")}


def eos_tokens(model, processor) -> list[int]:
    """Every id that ends a completion: those of the model's generation config and the tokenizer's own."""
    ids = model.generation_config.eos_token_id
    return sorted({*(ids if isinstance(ids, list) else [ids]), processor.tokenizer.eos_token_id} - {None})


def completion_mask(ids: torch.Tensor, eos_ids: list[int]) -> torch.Tensor:
    """(..., T), True up to and including the first EOS: by position, for what follows is filler, whatever its id."""
    ended = torch.isin(ids, torch.tensor(eos_ids, device=ids.device)).long()
    return ended.cumsum(-1) - ended == 0


def decode(processor, eos_ids: list[int], ids: torch.Tensor, mask: torch.Tensor) -> list[list[str]]:
    """Texts [B][G] without the final EOS. Other special tokens stay visible: they are not part of an answer block."""
    return [
        [processor.tokenizer.decode([i for i in o[m].tolist() if i not in eos_ids]) for o, m in zip(group, masks)]
        for group, masks in zip(ids.cpu(), mask.cpu())
    ]


# --------------------------------------------------------------------------------------------- preparing and checking


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


@dataclass
class Finding:
    """One row and what is known of it."""

    row: object
    example: Example | None = None  # None: the row itself cannot be read
    sound: tuple[float, int, int] | None = None  # seconds, Hz, channels
    problem: str = ""  # why it cannot be used, with file and row


def examine(path: str, audio_dir: str, decode: bool = False) -> Iterator[Finding]:
    """Every row of a file with its clip: the header, or with `decode` all of it. Nothing is raised for a bad row."""
    if audio_dir and not os.path.isdir(audio_dir):
        raise BadInput(f"--audio_dir {audio_dir}: no such folder")
    folder = audio_dir or os.path.dirname(path)

    def look(item):
        finding = Finding(item[0])
        try:
            finding.example = to_example(*item, folder)
            if finding.example.answer is not None:
                check_answer(finding.example)
            with open_audio(finding.example.audio) as file:
                finding.sound = file.frames / file.samplerate, file.samplerate, file.channels
            if decode:
                load_audio(finding.example.audio)
        except BadInput as error:
            finding.problem = str(error) if str(error).startswith(item[1]) else f"{item[1]}: {error}"
        return finding

    rows = read_rows(path)
    with ThreadPoolExecutor() as pool:  # most of the time is waiting for the disk
        yield from tqdm(pool.map(look, rows), total=len(rows), desc="checking", disable=None)


def convert_avqa(questions: str, audio_dir: str, output: str) -> None:
    """AVQA, original or as R1-AQA has it, to rows of our own; what cannot be used goes to a list of its own."""
    left_out = f"{os.path.splitext(output)[0]}.left_out.jsonl"
    for path in (output, left_out):
        if os.path.exists(path):
            raise BadInput(f"{path}: already there; remove it or name another --output")
    kept, lost, missing, base = [], [], 0, os.path.dirname(output) or "."
    for finding in examine(questions, audio_dir):
        example = finding.example
        if not finding.problem and example.answer is None:
            finding.problem = f"{example.place}: has no answer"
        if finding.problem:
            missing += example is not None and not os.path.isfile(example.audio)
            lost.append({"reason": finding.problem, "row": finding.row})
            continue
        row = {"audio": os.path.relpath(example.audio, base), "question": example.question}
        row |= {"choices": example.choices, "answer": example.answer}
        kept.append(row | {key: example.row[key] for key in ("id", "question_relation", "question_type") if key in example.row})
    if not kept:
        raise BadInput(f"{questions}: none of {len(lost)} rows can be used; the first: {lost[0]['reason']}")
    if lost:
        write_rows(left_out, lost)
    write_rows(output, kept)
    print(f"{len(kept) + len(lost)} questions: {len(kept)} found, {missing} without a clip, {len(lost) - missing} unusable")
    print(f"rows in {output}" + (f"; the others, each with its reason, in {left_out}" if lost else ""))


def check(path: str, audio_dir: str, decode: bool) -> bool:
    """Print all that is wrong with a file, then what is in it. True if every row can be used."""
    findings = list(examine(path, audio_dir, decode))
    examples = [finding.example for finding in findings if finding.example]
    sounds = [finding.sound for finding in findings if finding.sound]
    unusable = [finding.problem for finding in findings if finding.problem]
    names = [example.row.get("id") for example in examples]
    times = Counter(str(name) for name in names if name is not None)
    odd = [f"{e.place}: id {name} is there {times[str(name)]} times" for e, name in zip(examples, names) if times[str(name)] > 1]
    odd += [f"{e.place}: an option stands twice in {e.choices}" for e in examples if len(set(e.choices)) < len(e.choices)]
    for problem in unusable:
        print(f"unusable: {problem}")
    for problem in odd:
        print(f"odd: {problem}")

    def count(values):
        return ", ".join(f"{value}: {n}" for value, n in sorted(Counter(values).items()))

    print(f"{path}: {len(findings)} rows, {len(unusable)} of them unusable, {len(odd)} remarks")
    if sounds:
        seconds = np.array([sound[0] for sound in sounds])
        longest = f"median {np.median(seconds):.1f}, longest {seconds.max():.1f}"
        print(f"clips: {seconds.sum() / 3600:.2f} h; shortest {seconds.min():.1f} s, {longest}; {(seconds > 30).sum()} pass 30 s")
        print(f"Hz: {count(sound[1] for sound in sounds)}")
        print(f"channels: {count(sound[2] for sound in sounds)}")
    print(f"options: {count(len(example.choices) for example in examples)}")
    for key in ("task", "modality", "question_type"):
        if any(key in example.row for example in examples):
            print(f"{key}: {count(str(example.row.get(key)) for example in examples)}")
    if unanswered := sum(example.answer is None for example in examples):
        print(f"no answer: {unanswered} rows, which can be predicted and not trained on")
    return not unusable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    avqa = commands.add_parser("avqa", help="turn AVQA into training rows")
    avqa.add_argument("--questions", required=True, help="train_qa.json, or R1-AQA's JSON Lines")
    avqa.add_argument("--audio_dir", required=True, help="folder of the clips")
    avqa.add_argument("--output", required=True, help="JSON Lines to write")
    checks = commands.add_parser("check", help="find all that is wrong with a file; exit status 1 if a row is unusable")
    checks.add_argument("file", help="questions, for training or a benchmark")
    checks.add_argument("--audio_dir", default="", help="folder of the clips; empty: beside the questions")
    checks.add_argument("--decode", action="store_true", help="read every clip whole, not its header only")
    args = parser.parse_args()
    if args.command == "avqa":
        convert_avqa(args.questions, args.audio_dir, args.output)
    elif not check(args.file, args.audio_dir, args.decode):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"error: {error}")
