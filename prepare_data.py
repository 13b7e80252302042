"""Get data ready: AVQA to training rows, and a file checked before a GPU is rented.

python prepare_data.py avqa train_qa.json --audio_dir vggsound --output avqa_train.jsonl
python prepare_data.py check avqa_train.jsonl
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data import BadInput, Example, blame, check_answer, check_prompt, load_audio, open_audio, read_rows
from data import to_example, write_rows
from flags import run_command, say
from model import load_processor


@dataclass
class Finding:
    """One row and what is known of it."""

    row: object
    example: Example | None = None  # None: the row itself cannot be read
    sound: tuple[float, int, int] | None = None  # seconds, Hz, channels
    problem: str = ""  # why it cannot be used, with file and row


def examine(path: str, audio_dir: str, decode: bool = False, processor=None) -> Iterator[Finding]:
    """Every row of a file with its clip: the header, or with `decode` all of it. A bad row raises nothing."""
    if audio_dir and not os.path.isdir(audio_dir):
        raise BadInput(f"--audio_dir {audio_dir}: no such folder")
    folder = audio_dir or os.path.dirname(path)

    def look(item):
        finding = Finding(item[0])
        try:
            with blame(item[1]):
                finding.example = to_example(*item, folder)
                if finding.example.answer is not None:
                    check_answer(finding.example)
                if processor:
                    check_prompt(processor, finding.example, "think")  # the longest
                with open_audio(finding.example.audio) as file:
                    finding.sound = file.frames / file.samplerate, file.samplerate, file.channels
                if decode:
                    load_audio(finding.example.audio)
        except BadInput as error:
            finding.problem = str(error)
        return finding

    rows, _ = read_rows(path)
    with ThreadPoolExecutor() as pool:  # most of the time is waiting for the disk
        yield from tqdm(pool.map(look, rows), total=len(rows), desc="checking", disable=None)


def avqa(questions: str, *, audio_dir: str, output: str) -> None:
    """Turn AVQA into training rows.

    questions: train_qa.json, or R1-AQA's JSON Lines. audio_dir: folder of the clips. output: JSON Lines to
    write; rows that cannot be used go to a file of their own, OUTPUT.left_out.jsonl, each with its reason.
    """
    left_out = f"{os.path.splitext(output)[0]}.left_out.jsonl"
    for path in (output, left_out):
        if os.path.exists(path):
            raise BadInput(f"{path}: already there; remove it or name another --output")
    kept, lost, missing, base = [], [], 0, os.path.dirname(output) or "."
    for finding in examine(questions, audio_dir):
        example = finding.example
        if not finding.problem and example.answer is None:
            finding.problem = f"{example.location}: has no answer"
        if finding.problem:
            missing += example is not None and not os.path.isfile(example.audio)
            lost.append({"reason": finding.problem, "row": finding.row})
            continue
        row = {"audio": os.path.relpath(example.audio, base), "question": example.question}
        row |= {"choices": example.choices, "answer": example.answer}
        kept.append(
            row
            | {
                key: example.row[key]
                for key in ("id", "question_relation", "question_type")
                if key in example.row
            }
        )
    if not kept:
        raise BadInput(f"{questions}: none of {len(lost)} rows can be used; the first: {lost[0]['reason']}")
    if lost:
        write_rows(left_out, lost)
    write_rows(output, kept)
    counts = f"{len(kept)} found, {missing} without a clip, {len(lost) - missing} unusable"
    say(f"{len(kept) + len(lost)} questions: {counts}")
    say(f"rows in {output}" + (f"; the others, each with its reason, in {left_out}" if lost else ""))


def check(file: str, *, model: str = "", audio_dir: str = "", decode: bool = False) -> None:
    """Print all that is wrong with a file of questions, then what is in it. Exit status 1: a row is unusable.

    file: for training or a benchmark. model: whose tokenizer measures the questions; empty: none. audio_dir:
    folder of the clips; empty: beside the questions. decode: read every clip whole, not its header only.
    """
    processor = load_processor(model) if model else None
    findings = list(examine(file, audio_dir, decode, processor))
    examples = [finding.example for finding in findings if finding.example]
    sounds = [finding.sound for finding in findings if finding.sound]
    unusable = [finding.problem for finding in findings if finding.problem]
    names = [example.row.get("id") for example in examples]
    times = Counter(str(name) for name in names if name is not None)
    odd = [
        f"{e.location}: id {name} is there {times[str(name)]} times"
        for e, name in zip(examples, names)
        if times[str(name)] > 1
    ]
    odd += [
        f"{e.location}: an option stands twice in {e.choices}"
        for e in examples
        if len(set(e.choices)) < len(e.choices)
    ]
    for problem in unusable:
        say(f"unusable: {problem}")
    for problem in odd:
        say(f"odd: {problem}")

    def count(values):
        return ", ".join(f"{value}: {n}" for value, n in sorted(Counter(values).items()))

    say(f"{file}: {len(findings)} rows, {len(unusable)} of them unusable, {len(odd)} remarks")
    if sounds:
        seconds = np.array([sound[0] for sound in sounds])
        longest = f"median {np.median(seconds):.1f}, longest {seconds.max():.1f}"
        shortest, long = f"shortest {seconds.min():.1f} s", f"{(seconds > 30).sum()} pass 30 s"
        say(f"clips: {seconds.sum() / 3600:.2f} h; {shortest}, {longest}; {long}")
        say(f"Hz: {count(sound[1] for sound in sounds)}")
        say(f"channels: {count(sound[2] for sound in sounds)}")
    say(f"options: {count(len(example.choices) for example in examples)}")
    for key in ("task", "modality", "question_type"):
        if any(key in example.row for example in examples):
            say(f"{key}: {count(str(example.row.get(key)) for example in examples)}")
    if unanswered := sum(example.answer is None for example in examples):
        say(f"no answer: {unanswered} rows, which can be predicted and not trained on")
    if unusable:
        sys.exit(1)


if __name__ == "__main__":
    run_command(__doc__, avqa, check)
