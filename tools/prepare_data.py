"""Prepare data: convert a dataset from the hub, or AVQA; check a file of questions; filter it.

python -m tools.prepare_data hub TwinkStart/MMAU --split v05.15.25 --output mmau
python -m tools.prepare_data avqa train_qa.json --audio_dir vggsound-audio --output avqa_train.jsonl
python -m tools.prepare_data check avqa_train.jsonl
python -m tools.prepare_data filter avqa_train.jsonl --predictions runs/a/predictions.json --output hard.jsonl
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
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
from tqdm import tqdm

from cli import BadInput, check_at_least, located, printable, run_main, say
from data import SAMPLE_RATE, Example, check_answer, check_prompt, is_silent, load_audio, lock_folder
from data import open_audio, read_rows, to_example, write_atomically, write_rows
from model import load_processor
from rewards import judge, prediction_of, words

NOT_AN_OPTION = "is not among the options"  # hub() recognizes this reason: the answers may count from 1


def check_free(path: str) -> None:
    """Raise BadInput if the file exists: nothing is overwritten."""
    if os.path.exists(path):
        raise BadInput(f"{path}: already exists; remove it or name another --output")


def write_converted(source: str, target: str, rows: list[dict], refused: list[dict]) -> None:
    """Write the converted rows to `target` and the rejected ones next to it, and print both counts.

    refused: {"reason", "row"} for every row that cannot be used. Raises BadInput if no row can be used.
    """
    total = len(rows) + len(refused)
    first = f"; the first: {refused[0]['reason']}" if refused else ""
    if not rows:
        raise BadInput(f"{source}: none of {total} rows can be used{first}")

    refused_path = f"{os.path.splitext(target)[0]}.left_out.jsonl"
    if refused:
        write_rows(refused_path, refused)
    elif os.path.exists(refused_path):
        os.remove(refused_path)  # from an earlier conversion
    write_rows(target, rows)

    say(f"{total} rows: {len(rows)} in {target}, {len(refused)} unusable")
    if refused:
        say(f"unusable rows, with the reasons, are in {refused_path}{first}")


# ---------------------------------------------------------------- hub


def hub(name: str, output: str, split: str = "", limit: int = 0, video_to_audio: bool = False) -> None:
    """Convert a dataset from the hub, or a local one, into questions.jsonl and a folder of clips.

    Each clip is copied byte for byte, and only once: a repeated call does not write it again. Rows that
    cannot be used are written to questions.left_out.jsonl, each with the reason.
    """
    target = os.path.join(output, "questions.jsonl")
    check_free(target)
    lock = lock_folder(output)  # noqa: F841, locked until this function returns
    os.makedirs(os.path.join(output, "clips"), exist_ok=True)

    folder = None  # where a local dataset has its clips
    if os.path.isdir(name):
        folder = name
    elif os.path.isfile(name):
        folder = os.path.dirname(name)

    questions = []
    refused = []
    indices = []  # integer answers, each with the reason if its row was refused
    rows = islice(load_rows(name, split), limit or None)
    for row, location in tqdm(rows, desc="rows", total=limit or None, disable=None):
        reason = ""
        try:
            with located(location):
                question = convert_row(row, video_to_audio)
                content, clip_name = find_clip(row, folder)
                with open_audio(clip_name, content) as file:
                    extension = file.format.lower().replace("wavex", "wav")
        except BadInput as error:
            reason = str(error)
            refused.append({"reason": reason, "row": to_json(row)})
        else:
            # named after a hash of its content: safe, and the same on every call
            clip = f"clips/{hashlib.sha256(content).hexdigest()[:32]}.{extension}"
            clip_path = os.path.join(output, clip)
            if not os.path.exists(clip_path):
                write_atomically(clip_path, content)
            questions.append(to_json({"audio": clip, **question}))
            if len(questions) <= 3:  # so that the user can check the conversion
                shown = {key: questions[-1][key] for key in ("audio", "question", "choices", "answer")}
                tqdm.write(printable(f"{location}: {shown}"))
        if isinstance(row, dict) and type(row.get("answer")) is int:
            indices.append((row["answer"], reason))

    if count_from_one(indices):
        raise BadInput(f"{name}: the answers look like 1-based indices; use 0-based ones, or text")
    write_converted(name, target, questions, refused)


def count_from_one(indices: list[tuple[int, str]]) -> bool:
    """Whether the answers look like 1-based indices: none is 0, and at least one is past the last option."""
    has_zero = any(index <= 0 for index, _ in indices)
    is_past_last = any(NOT_AN_OPTION in reason for _, reason in indices)
    return is_past_last and not has_zero


def load_rows(name: str, split: str) -> Iterator[tuple[object, str]]:
    """Yield the rows of a dataset, each with its location. The audio is not decoded."""
    if os.path.isfile(name):
        if split:
            raise BadInput(f"--split {split} applies to a dataset or a folder, but {name} is a file")
        if name.endswith((".json", ".jsonl")):
            yield from read_rows(name)[0]
            return
        if not name.endswith((".parquet", ".arrow")):
            raise BadInput(f"{name}: only .parquet, .arrow, .json and .jsonl files are read")
    with located(name):
        for number, row in enumerate(open_dataset(name, split), 1):
            yield row, f"{name}: row {number}"


def open_dataset(name: str, split: str):
    """Open a dataset from the hub, a folder, or a file with the `datasets` library.

    Returns an iterable of rows, which are read lazily.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadInput("`pip install datasets` first: it reads hub datasets, parquet and arrow") from None

    if os.path.isfile(name):
        kind = "parquet" if name.endswith(".parquet") else "arrow"
        data = load_dataset(kind, data_files=name, split="train", streaming=True)
    elif os.path.isfile(os.path.join(name, split, "state.json")):  # written by save_to_disk
        files = os.path.join(name, split, "*.arrow")
        data = load_dataset("arrow", data_files=files, split="train", streaming=True)
    else:
        data = load_dataset(name, split=split or None, streaming=True)

    if isinstance(data, dict):  # by split
        if len(data) > 1:
            raise BadInput(f"has the splits {', '.join(data)}: choose one with --split")
        (data,) = data.values()
    return data.decode(False)


def to_json(row: object) -> object:
    """The row in a form that JSON can store: bytes become their count, dates and the like become text."""

    def replacement(value) -> str:
        return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)

    return json.loads(json.dumps(row, default=replacement))


# ---------------------------------------------------------------- hub: the clip of a row


def is_clip(value: object) -> bool:
    """Whether a value is {"bytes", "path"}, the form in which `datasets` returns undecoded audio."""
    return isinstance(value, dict) and len(value) > 0 and value.keys() <= {"bytes", "path"}


def contains_clips(value: object) -> bool:
    """Whether the value of a column is a clip or a list that contains clips."""
    if isinstance(value, list):
        return any(is_clip(item) for item in value)
    return is_clip(value)


def find_clip(row: dict, folder: str | None) -> tuple[bytes, str]:
    """Content and name of a row's clip. Raises BadInput unless the row has exactly one.

    folder: where to look for a clip given only by name; None for a dataset from the hub.
    """
    columns = [column for column in row if contains_clips(row[column])]
    if not columns:
        named = [column for column in ("audio", "audio_path", "audio_id") if row.get(column)]
        columns = named[:1]  # the others name the same clip
    clips = []
    for column in columns:
        value = row[column]
        clips += value if isinstance(value, list) else [value]
    if len(clips) != 1:
        where = ", ".join(columns) or "no audio column"
        raise BadInput(f"has {len(clips)} clips ({where}), not one")

    clip = clips[0] if is_clip(clips[0]) else {"path": clips[0]}
    path = clip.get("path")
    if clip.get("bytes"):
        return clip["bytes"], path or "the clip"
    if not isinstance(path, str) or not path.strip():
        raise BadInput(f"the clip is empty (column {columns[0]})")
    if folder is None:
        instead = "`hf download` the repository, unpack its archives, and pass its question file instead"
        raise BadInput(f"{path} is a separate file in the repository: {instead}")
    path = os.path.join(folder, path)
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such audio file")
    with open(path, "rb") as file:
        return file.read(), path


# ---------------------------------------------------------------- hub: the question of a row


def convert_row(row: object, video_to_audio: bool) -> dict:
    """question, choices and answer as data.py reads them, plus the row's other columns except the clip.

    Raises BadInput unless there is exactly one way to read the row.
    """
    if not isinstance(row, dict):
        raise BadInput("not a JSON object")
    question = row.get("question") or row.get("question_text")
    choices_key = "choices"
    for key in ("choices", "multi_choice", "options"):
        if row.get(key):
            choices_key = key
            break
    choices = row.get(choices_key)
    if isinstance(choices, str):
        with suppress(ValueError):  # to_example refuses anything but a list
            choices = json.loads(choices)
    if not choices and isinstance(question, str):
        question, choices = split_question(question)
    if video_to_audio and isinstance(question, str):
        question = question.replace("video", "audio")  # as R1-AQA does

    # checks the question and the options; from here on the options are text
    choices = to_example({"audio": "clip", "question": question, "choices": choices}, "", "").choices
    converted = {
        "question": question,
        "choices": without_letters(choices) or choices,
        "answer": answer_text(row.get("answer"), choices),
    }
    replaced = {"audio", "question", "question_text", "choices", "multi_choice", choices_key, "answer"}
    for key, value in row.items():
        if key not in replaced and not contains_clips(value):
            converted[key] = value
    return converted


def split_question(text: str) -> tuple[str, list[str] | None]:
    """Split off options that follow the question, in lettered lines below "Choices:" or "Options:"."""
    parts = re.split(r"\n\s*(?:choices|options):\s*\n", text, flags=re.IGNORECASE)
    if len(parts) == 2:
        lines = parts[1].strip().splitlines()
        if without_letters(lines):
            return parts[0], lines
    return text, None


def split_letter(text: str) -> tuple[int | None, str]:
    """Split "B. dog", "b) dog" or "(B) dog" into (1, "dog"), and "B" into (1, ""); else (None, text)."""
    match = re.fullmatch(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])(?:[.):]|\s*$))\s*(.*)", text, re.DOTALL)
    if not match:
        return None, text
    letter = match[1] or match[2]
    return ord(letter.lower()) - ord("a"), match[3].strip()


def without_letters(choices: list[str]) -> list[str] | None:
    """The options without their letters, if each has text and the letter for its position; else None."""
    texts = []
    for number, choice in enumerate(choices):
        position, text = split_letter(choice)
        if position != number or not text:
            return None
        texts.append(text)
    return texts


def answer_text(answer: object, choices: list[str]) -> str | None:
    """The option that an answer names by its text, its letter, both, or its 0-based index.

    None if there is no answer. Raises BadInput unless the answer can mean exactly one option.
    """
    if answer is None or answer == "":
        return None
    unlettered = without_letters(choices)
    options = [option.strip() for option in unlettered or choices]
    meant = {option for option in options if option == str(answer).strip()}

    if isinstance(answer, str):
        position, text = split_letter(answer)
        if not unlettered and position is not None:
            # with letters out of order, it is unclear which option "D" means
            splits = [split_letter(choice) for choice in choices]
            has_letters = any(letter is not None and rest for letter, rest in splits)
            if meant or has_letters:
                position = None  # exact text takes precedence over a letter: "D" among the notes G, A#, D, E
            else:
                # "A" may mean the option "a" or the first option
                meant = {option for option in options if option.lower() == answer.strip().lower()}
    else:
        position, text = answer, ""

    is_index = type(position) is int and 0 <= position < len(options)
    if is_index and text in ("", options[position]):
        meant.add(options[position])
    if not meant:
        raise BadInput(f"answer {answer!r} {NOT_AN_OPTION} {choices}")
    if len(meant) > 1:
        raise BadInput(f"answer {answer!r} could be any of {sorted(meant)}")
    return meant.pop()


# ---------------------------------------------------------------- avqa


@dataclass
class Finding:
    """What was found out about a row."""

    row: object  # as it was read
    problem: str = ""  # why the row cannot be used
    example: Example | None = None  # None if the question cannot be read
    seconds: float | None = None  # length of the clip; None if unknown
    rate: int = 0  # Hz; 0 if the clip cannot be opened
    channels: int = 0
    silence: str = ""  # what is silent, if the clip was decoded


def examine(path: str, audio_dir: str, decode: bool = False, processor=None) -> Iterator[Finding]:
    """Examine every row of a file of questions.

    decode: read all samples of the clips, not only the headers. processor: also check the questions' length.
    """
    if audio_dir and not os.path.isdir(audio_dir):
        raise BadInput(f"--audio_dir {audio_dir}: no such folder")
    folder = audio_dir or os.path.dirname(path)

    def examine_row(row_and_location) -> Finding:
        row, location = row_and_location
        finding = Finding(row)
        try:
            with located(location):
                example = to_example(row, location, folder)
                finding.example = example
                if example.answer is not None:
                    check_answer(example)
                if processor:
                    check_prompt(processor, example, "think")  # the longest of the prompts
                with open_audio(example.audio) as file:
                    finding.seconds = file.seconds()
                    finding.rate = file.samplerate
                    finding.channels = file.channels
                if decode:
                    wave = load_audio(example.audio)
                    finding.seconds = len(wave) / SAMPLE_RATE
                    finding.silence = describe_silence(example.audio, wave, finding.channels)
        except BadInput as error:
            finding.problem = str(error)
        return finding

    rows, _ = read_rows(path)
    with ThreadPoolExecutor() as pool:  # most of the time is spent waiting for the disk
        yield from tqdm(pool.map(examine_row, rows), total=len(rows), desc="checking", disable=None)


def describe_silence(path: str, wave: np.ndarray, channels: int) -> str:
    """Say what is silent in a clip whose first channel is `wave`; "" if that channel has sound."""
    if not is_silent(wave):
        return ""
    for channel in range(1, channels):
        if not is_silent(load_audio(path, channel=channel)):
            return f"channel 0, which is used, is silent, but channel {channel} is not"
    return "the clip is silent"


def avqa(questions: str, audio_dir: str, output: str) -> None:
    """Convert AVQA to training rows, from its train_qa.json or from R1-AQA's JSON Lines.

    Rows that cannot be used are written to a second file, *.left_out.jsonl, each with the reason.
    """
    check_free(output)
    base = os.path.dirname(output) or "."
    rows = []
    refused = []
    missing = 0
    for finding in examine(questions, audio_dir):
        example = finding.example
        problem = finding.problem
        if not problem and example.answer is None:
            problem = f"{example.location}: has no answer"
        if problem:
            refused.append({"reason": problem, "row": finding.row})
            missing += example is not None and not os.path.isfile(example.audio)
            continue
        row = {
            "audio": os.path.relpath(example.audio, base),
            "question": example.question,
            "choices": example.choices,
            "answer": example.answer,
        }
        for key in ("id", "question_relation", "question_type"):
            if key in finding.row:
                row[key] = finding.row[key]
        rows.append(row)

    write_converted(questions, output, rows, refused)
    if missing:
        say(f"rows whose clip is not in {audio_dir}: {missing}")


# ---------------------------------------------------------------- check


def check(file: str, model: str = "", audio_dir: str = "", decode: bool = False) -> None:
    """Print everything that is wrong with a file of questions, then a summary of its contents.

    The exit status is 1 if a row cannot be used.
    """
    processor = load_processor(model) if model else None
    findings = list(examine(file, audio_dir, decode, processor))
    problems = [finding.problem for finding in findings if finding.problem]
    examples = [finding.example for finding in findings if finding.example]
    warnings = find_oddities(findings)
    for problem in problems:
        say(f"unusable: {problem}")
    for warning in warnings:
        say(f"warning: {warning}")
    say(f"{file}: {len(findings)} rows, {len(problems)} unusable, {len(warnings)} warnings")
    show_clips([finding for finding in findings if finding.rate])
    if not decode:
        say("only the headers of the clips were read: --decode reads all of their samples")
    show_questions(examples)
    if problems:
        sys.exit(1)


def find_oddities(findings: list[Finding]) -> list[str]:
    """Warnings about rows that can be used, but may be wrong."""
    warnings = []
    first_locations = {}  # by id
    for finding in findings:
        example = finding.example
        if not example:
            continue
        location = example.location
        if finding.silence:
            warnings.append(f"{location}: {finding.silence}: {example.audio}")
        for one, other in combinations(dict.fromkeys(example.choices), 2):
            if words(one) == words(other):
                warnings.append(f"{location}: MMAU's rule cannot tell {one!r} from {other!r}")
        row_id = example.row.get("id")
        if row_id is not None:
            first = first_locations.setdefault(str(row_id), location)
            if first != location:
                warnings.append(f"{location}: has the same id as {first}: {row_id}")
        if len(set(example.choices)) < len(example.choices):
            warnings.append(f"{location}: an option is repeated: {example.choices}")
        if example.found_by_name:
            warnings.append(
                f"{location}: there is no clip at its path; a file of the same name is used: {example.audio}"
            )
    return warnings


def count_values(values: list) -> str:
    """Values with their counts, as "2: 6, 3: 1"."""
    return ", ".join(f"{value}: {count}" for value, count in sorted(Counter(values).items()))


def show_clips(findings: list[Finding]) -> None:
    """Print the lengths, sampling rates and channels of the clips that can be opened."""
    if not findings:
        return
    seconds = np.array([finding.seconds for finding in findings if finding.seconds is not None])
    if len(seconds):
        hours = seconds.sum() / 3600
        long = (seconds > 30).sum()
        lengths = f"{seconds.min():.1f} to {seconds.max():.1f} s, median {np.median(seconds):.1f} s"
        say(f"clips: {len(findings)}, {hours:.2f} h in all; {lengths}; {long} longer than 30 s")
    silent = sum(bool(finding.silence) for finding in findings)
    if silent:
        say(f"{silent} clips are silent, or silent in channel 0, which is used")
    say(f"sampling rates in Hz: {count_values([finding.rate for finding in findings])}")
    say(f"channels: {count_values([finding.channels for finding in findings])}")


def show_questions(examples: list[Example]) -> None:
    """Print the numbers of options, the kinds of questions, and how many have no answer."""
    say(f"options per question: {count_values([len(example.choices) for example in examples])}")
    for key in ("task", "modality", "question_type"):
        if any(key in example.row for example in examples):
            say(f"{key}: {count_values([str(example.row.get(key)) for example in examples])}")
    unanswered = sum(example.answer is None for example in examples)
    if unanswered:
        say(f"{unanswered} rows have no answer: they can be used for prediction, but not for training")
    show_guesses(examples)


def show_guesses(examples: list[Example]) -> None:
    """Print how often two text-only guessers are right, next to chance: what the text alone gives away.

    One picks the option that is most often the answer to the other questions, one picks the longest option.
    """
    answers = []  # (answer, options) of each question whose answer is among its options
    for example in examples:
        options = [normalized(choice) for choice in example.choices]
        if example.answer is not None and normalized(example.answer) in options:
            answers.append((normalized(example.answer), options))
    if not answers:
        return

    counts = Counter(answer for answer, _ in answers)
    frequent = longest = chance = 0.0
    for answer, options in answers:
        counts[answer] -= 1  # a question must not give away its own answer
        frequent += share_of_best(answer, options, [counts[option] for option in options])
        counts[answer] += 1
        longest += share_of_best(answer, options, [len(option) for option in options])
        chance += share_of_best(answer, options, [0] * len(options))
    n = len(answers)
    guesses = f"most frequent answer elsewhere {frequent / n:.1%}, longest option {longest / n:.1%}"
    say(f"right without listening: {guesses}, chance {chance / n:.1%} ({n} questions)")


def normalized(text: str) -> str:
    """The text, ignoring what nobody could hear: upper or lower case, and space at the ends."""
    return text.strip().lower()


def share_of_best(answer: str, options: list[str], scores: list[float]) -> float:
    """The chance that the option with the best score is the answer, if ties are broken at random."""
    best = [option for option, score in zip(options, scores) if score == max(scores)]
    return best.count(answer) / len(best)


# ---------------------------------------------------------------- filter


def filter_rows(file: str, predictions: str, output: str, drop: str = "right") -> None:
    """Keep the questions that a model got wrong (or, with --drop wrong, those that it got right).

    Rows without an answer or a prediction are dropped.
    """
    check_free(output)
    rows, _ = read_rows(file)
    answered, _ = read_rows(predictions)
    if len(answered) > len(rows):
        raise BadInput(f"{predictions}: has {len(answered)} rows, but {file} has only {len(rows)}")

    kept = []
    results = Counter()
    results["unknown"] = len(rows) - len(answered)  # after evaluate.py --limit
    for (row, location), (prediction, where) in zip(rows, answered):
        result = compare_with_answer(row, location, prediction, where)
        results[result] += 1
        if result in ("right", "wrong") and result != drop:
            kept.append(row)

    counts = f"{len(rows)} rows: {results['right']} right, {results['wrong']} wrong"
    if results["unknown"]:
        counts += f", {results['unknown']} without an answer or a prediction"
    if not kept:
        raise BadInput(f"{predictions}: no rows remain ({counts})")
    write_rows(output, kept)
    say(f"{counts}; {len(kept)} in {output}")
    folder = os.path.dirname(file)
    if os.path.realpath(os.path.dirname(output)) != os.path.realpath(folder):
        say(f"its clips are in the same place as those of {file}: use it with --audio_dir {folder or '.'}")


def compare_with_answer(row: object, location: str, prediction: object, where: str) -> str:
    """Return "right", "wrong" or "unknown". Raises BadInput if the prediction belongs to another row."""
    if isinstance(prediction, dict) and "unusable" in prediction:  # set by evaluate.py
        return "unknown"
    is_right = judge(prediction, where)

    # evaluate.py copies all columns, and overwrites those of earlier predictions
    columns = {}
    if isinstance(row, dict):
        for key, value in row.items():
            if key not in ("model_output", "model_prediction", "completion"):
                columns[key] = value
    copied = {key: prediction.get(key) for key in columns}
    if not columns or json.dumps(columns) != json.dumps(copied):  # as text, since nan is not equal to nan
        raise BadInput(f"{where}: does not belong to {location}; were these predictions made from that file?")

    if is_right is None or prediction_of(prediction) is None:
        return "unknown"
    return "right" if is_right else "wrong"


# ---------------------------------------------------------------- command line


def parse_flags() -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    name = "python -m tools.prepare_data"
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    summary = "convert a dataset from the hub, or a local one"
    command = commands.add_parser("hub", help=summary, description=hub.__doc__)
    command.add_argument("name", help="hub name, or a folder or file of parquet, arrow or JSON Lines")
    command.add_argument("--output", required=True, help="folder for questions.jsonl and the clips")
    command.add_argument("--split", default="", help="which split to convert, if there are several")
    command.add_argument("--limit", type=int, default=0, help="read only the first N rows; 0: all")
    text = "replace 'video' with 'audio' in the questions, as R1-AQA does"
    command.add_argument("--video_to_audio", action="store_true", help=text)

    command = commands.add_parser("avqa", help="convert AVQA and its clips", description=avqa.__doc__)
    command.add_argument("questions", help="train_qa.json, or R1-AQA's JSON Lines")
    command.add_argument("--audio_dir", required=True, help="folder with the clips")
    command.add_argument("--output", required=True, help="JSON Lines file to write")

    summary = "find what is wrong with a file of questions"
    command = commands.add_parser("check", help=summary, description=check.__doc__)
    command.add_argument("file", help="questions for training or a benchmark")
    command.add_argument("--model", default="", help="also find questions that are too long for this model")
    command.add_argument("--audio_dir", default="", help="clips folder; default: the questions' folder")
    command.add_argument("--decode", action="store_true", help="read all samples, not only the headers")

    summary = "keep the questions that a model got wrong (or right)"
    command = commands.add_parser("filter", help=summary, description=filter_rows.__doc__)
    command.add_argument("file", help="file of questions")
    command.add_argument("--predictions", required=True, help="evaluate.py's predictions.json for this file")
    command.add_argument("--output", required=True, help="JSON Lines file to write")
    command.add_argument("--drop", default="right", choices=("right", "wrong"), help="default: right")
    return parser.parse_args()


def main() -> None:
    flags = parse_flags()
    if flags.command == "hub":
        check_at_least(flags, limit=0)
        hub(flags.name, flags.output, flags.split, flags.limit, flags.video_to_audio)
    elif flags.command == "avqa":
        avqa(flags.questions, flags.audio_dir, flags.output)
    elif flags.command == "check":
        check(flags.file, flags.model, flags.audio_dir, flags.decode)
    else:
        filter_rows(flags.file, flags.predictions, flags.output, flags.drop)


if __name__ == "__main__":
    run_main(main)
