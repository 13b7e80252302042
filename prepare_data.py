"""Get data ready: fetch it by its name on the hub, or convert AVQA; check it; filter it.

python prepare_data.py hub TwinkStart/MMAU --split v05.15.25 --output mmau
python prepare_data.py avqa train_qa.json --audio_dir vggsound-audio --output avqa_train.jsonl
python prepare_data.py check avqa_train.jsonl
python prepare_data.py filter avqa_train.jsonl --predictions runs/eval/predictions.json --output hard.jsonl
"""

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

import numpy as np
from tqdm import tqdm

from data import BadInput, blame, check_answer, check_prompt, load_audio, lock_folder, open_audio
from data import printable, read_log, read_rows, to_example, write_rows, write_whole
from flags import run_command, say
from model import load_processor
from rewards import judge, prediction_of

# ---------------------------------------------------------------- from the hub


def hub(name: str, *, output: str, split: str = "", limit: str = "0", video_to_audio: bool = False) -> None:
    """Turn a data set of the hub, or a local one, into rows for training or evaluation.

    name: on the hub; or a folder or file of parquet, arrow or JSON Lines, with the sound inside or beside it.
    output: folder for questions.jsonl and the clips, each written once, as the bytes it came in; rows that
    cannot be used go to questions.left_out.jsonl, each with its reason. limit: read the first so many rows;
    0: all. video_to_audio: questions say "audio" for "video", as R1-AQA's. An interrupted call goes on.
    """
    files = ("questions.jsonl", "questions.left_out.jsonl", "progress.jsonl")
    target, left_out, progress = (os.path.join(output, file) for file in files)
    if not limit.isdecimal():
        raise BadInput(f"--limit must be a whole number, not {limit}")
    if os.path.exists(target):
        raise BadInput(f"{target}: already there; remove it or name another --output")
    lock = lock_folder(output)  # noqa: F841, held to the end
    os.makedirs(os.path.join(output, "clips"), exist_ok=True)
    total, state, call = 0, None, [name, split, limit, video_to_audio]
    for *_, before, made_by in read_log(progress):  # of an interrupted call
        if made_by != call:
            raise BadInput(f"{progress}: of a call with other flags; repeat that, or name another --output")
        total, state = total + 1, before
    folder = name if os.path.isdir(name) else os.path.dirname(name) if os.path.isfile(name) else None
    most, shown = int(limit) or None, 0
    rows = islice(load_rows(name, split, total, state), most and most - total)
    with open(progress, "a") as log:
        log.write("\n" if log.tell() else "")  # a kill may have left half a line
        for row, location, state in tqdm(rows, desc="rows", initial=total, total=most, disable=None):
            total, is_good = total + 1, True
            try:
                with blame(location):
                    item = to_own_format(row, video_to_audio)
                    content, clip = clip_bytes(row, folder)
                    with open_audio(clip, content) as file:
                        kind = file.format.lower().replace("wavex", "wav")
            except BadInput as error:
                is_good, item = False, {"reason": str(error), "row": row}
            if is_good:
                # a safe name, and the same for the same clip
                item = {"audio": f"clips/{hashlib.sha256(content).hexdigest()[:32]}.{kind}"} | item
                if not os.path.exists(path := os.path.join(output, item["audio"])):
                    write_whole(path, content)
                if shown < 3:  # so that a person sees whether it is right
                    tqdm.write(printable(f"{location}: {dict(islice(item.items(), 4))}"))
                    shown += 1
            answer = row.get("answer") if isinstance(row, dict) else None
            log.write(json.dumps([is_good, item, answer, state, call], default=without_bytes) + "\n")
    write_converted(name, progress, target, left_out, total)


def write_converted(name: str, progress: str, target: str, left_out: str, total: int) -> None:
    """Turn the log of a conversion into its files, and say what is in them."""

    def items(good):
        return (item for is_good, item, *_ in read_log(progress) if is_good == good)

    if are_from_one(progress):
        os.remove(progress)
        raise BadInput(f"{name}: its answers seem to be indices from 1; write them from 0, or as text")
    reasons = [item["reason"] for item in items(False)]
    first = f"; the first: {reasons[0]}" if reasons else ""
    if len(reasons) == total:
        os.remove(progress)
        raise BadInput(f"{name}: none of {total} rows can be used{first}")
    if reasons:
        write_rows(left_out, items(False))
    write_rows(target, items(True))
    os.remove(progress)
    say(f"{total} rows: {total - len(reasons)} in {target}, {len(reasons)} unusable")
    if reasons:
        say(f"these, each with its reason, in {left_out}{first}")


def are_from_one(progress: str) -> bool:
    """Whether answers seem to be indices from 1: none is 0, and some are past the options."""
    given = [(answer, item) for _, item, answer, *_ in read_log(progress) if type(answer) is int]
    past = any("is none of the options" in item.get("reason", "") for _, item in given)
    return past and all(answer > 0 for answer, _ in given)


def load_rows(name: str, split: str, done: int, state) -> Iterator[tuple[object, str, object]]:
    """Rows after the first `done`, each with its location and the loader's state; no sound is decoded."""
    kind = os.path.splitext(name)[1] if os.path.isfile(name) else ""
    if split and kind:
        raise BadInput(f"--split {split} is for a name or a folder, and {name} is a file")
    if kind in (".json", ".jsonl"):
        yield from ((row, location, None) for row, location in read_rows(name)[0][done:])
        return
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadInput("`pip install datasets` first: it reads the hub, parquet and arrow") from None
    with blame(name):
        if kind in (".parquet", ".arrow"):
            data = load_dataset(kind[1:], data_files=name, split="train", streaming=True)
        elif os.path.isfile(os.path.join(name, split, "state.json")):  # of save_to_disk
            files = os.path.join(name, split, "*.arrow")
            data = load_dataset("arrow", data_files=files, split="train", streaming=True)
        else:
            data = load_dataset(name, split=split or None, streaming=True)
        if isinstance(data, dict):
            if len(data) > 1:
                raise BadInput(f"has the splits {', '.join(data)}: choose one by --split")
            (data,) = data.values()
        data = data.decode(False)
        if state:
            data.load_state_dict(state)
        for n, row in enumerate(data, done + 1):
            yield row, f"{name}: row {n}", data.state_dict()


def cells(value: object) -> list[dict]:
    """The clips {bytes, path} that a column's value is, or is a list of."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, dict) and v and v.keys() <= {"bytes", "path"}]


def clip_bytes(row: dict, folder: str | None) -> tuple[bytes, str]:
    """Bytes and name of a row's one clip. folder: of the rows, for clips beside them; None: on the hub."""
    columns = [column for column in row if cells(row[column])]
    columns = columns or [column for column in ("audio", "audio_path", "audio_id") if row.get(column)][:1]
    clips = [clip for c in columns for clip in (row[c] if isinstance(row[c], list) else [row[c]])]
    if len(clips) != 1:
        raise BadInput(f"{len(clips)} clips ({', '.join(columns) or 'no column audio'}), not one")
    clip = clips[0] if cells(clips) else {"path": clips[0]}
    path = clip.get("path")
    if clip.get("bytes"):
        return clip["bytes"], path or "the clip"
    if not isinstance(path, str) or not path.strip():
        raise BadInput(f"an empty clip ({columns[0]})")
    if folder is None:
        ways = "`hf download` it, unpack its archives, and name its file of questions instead"
        raise BadInput(f"{path} lies beside the rows in the repository: {ways}")
    path = os.path.join(folder, path)
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such audio file")
    with open(path, "rb") as file:
        return file.read(), path


def without_bytes(value: object) -> str:
    """What stands in JSON for a value that it cannot hold."""
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def to_own_format(row: object, video_to_audio: bool) -> dict:
    """question, choices and answer as data.py reads them, and the row's other columns but the clip.

    Raises BadInput unless there is exactly one way to read the row.
    """
    if not isinstance(row, dict):
        raise BadInput("not a JSON object")
    question_key = "question" if row.get("question") else "question_text"
    choices_key = next((key for key in ("choices", "multi_choice", "options") if row.get(key)), "choices")
    question, choices = row.get(question_key), row.get(choices_key)
    if isinstance(choices, str):
        with suppress(ValueError):  # then to_example refuses it
            choices = json.loads(choices)
    if not choices and isinstance(question, str):
        parts = re.split(r"\n\s*(?:choices|options):\s*\n", question, flags=re.IGNORECASE)
        if len(parts) == 2 and without_letters(lines := parts[1].strip().splitlines()):
            question, choices = parts[0], lines
    if video_to_audio and isinstance(question, str):
        question = question.replace("video", "audio")
    choices = to_example({"audio": "clip", "question": question, "choices": choices}, "", "").choices
    answer = to_text(row.get("answer"), choices)
    own = {"question": question, "choices": without_letters(choices) or choices, "answer": answer}
    used = question_key, choices_key, "question_text", "multi_choice", "answer", "audio"
    return own | {key: value for key, value in row.items() if key not in used and not cells(value)}


def split_letter(text: str) -> tuple[int | None, str]:
    """(1, "dog") of "B. dog", "b) dog" and "(B) dog"; (1, "") of "B"; (None, text) without a letter."""
    pattern = r"\s*(?:\(([a-z])\)|([a-z])(?:[.):]|\s*$))\s*(.*)"
    match = re.fullmatch(pattern, text, re.IGNORECASE | re.DOTALL)
    return (ord((match[1] or match[2]).lower()) - ord("a"), match[3].strip()) if match else (None, text)


def without_letters(choices: list[str]) -> list[str] | None:
    """The options without their letters, if each has the letter of its position; else None."""
    parts = [split_letter(choice) for choice in choices]
    is_lettered = all(position == n and rest for n, (position, rest) in enumerate(parts))
    return [rest for _, rest in parts] if is_lettered else None


def to_text(answer: object, choices: list[str]) -> str | None:
    """The option that an answer means by its text, letter, both, or index from 0; None for no answer."""
    if answer is None or answer == "":
        return None
    lettered = without_letters(choices)
    texts = [text.strip() for text in lettered or choices]
    meant = {text for text in texts if text == str(answer).strip()}
    position, rest = split_letter(answer) if isinstance(answer, str) else (answer, "")
    if isinstance(answer, str) and not lettered:
        # a text comes before a letter ("D" among notes); options with other letters leave open what "D" means
        has_letters = any(letter is not None and rest for letter, rest in map(split_letter, choices))
        position = None if meant or has_letters else position
        if position is not None:  # "A" may mean the option "a"
            meant = {text for text in texts if text.lower() == answer.strip().lower()}
    if type(position) is int and 0 <= position < len(texts) and rest in ("", texts[position]):
        meant.add(texts[position])
    if len(meant) != 1:
        problem = f"could be any of {sorted(meant)}" if meant else f"is none of the options {choices}"
        raise BadInput(f"answer {answer!r} {problem}")
    return meant.pop()


# ---------------------------------------------------------------- from AVQA and its clips


def examine(path: str, audio_dir: str, decode: bool = False, processor=None) -> Iterator[tuple]:
    """Every row of a file, its Example, its clip's (seconds, Hz, channels), and why it cannot be used or "".

    Example and clip are None where they cannot be read. decode: read the whole clip, not its header only.
    """
    if audio_dir and not os.path.isdir(audio_dir):
        raise BadInput(f"--audio_dir {audio_dir}: no such folder")
    folder = audio_dir or os.path.dirname(path)

    def look(item):
        row, location = item
        example, sound, problem = None, None, ""
        try:
            with blame(location):
                example = to_example(row, location, folder)
                if example.answer is not None:
                    check_answer(example)
                if processor:
                    check_prompt(processor, example, "think")  # the longest
                with open_audio(example.audio) as file:
                    sound = file.frames / file.samplerate, file.samplerate, file.channels
                if decode:
                    load_audio(example.audio)
        except BadInput as error:
            problem = str(error)
        return row, example, sound, problem

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
    for row, example, _, problem in examine(questions, audio_dir):
        if not problem and example.answer is None:
            problem = f"{example.location}: has no answer"
        if problem:
            missing += example is not None and not os.path.isfile(example.audio)
            lost.append({"reason": problem, "row": row})
            continue
        own = {"audio": os.path.relpath(example.audio, base), "question": example.question}
        own |= {"choices": example.choices, "answer": example.answer}
        others = ("id", "question_relation", "question_type")
        kept.append(own | {key: row[key] for key in others if key in row})
    if not kept:
        raise BadInput(f"{questions}: none of {len(lost)} rows can be used; the first: {lost[0]['reason']}")
    if lost:
        write_rows(left_out, lost)
    write_rows(output, kept)
    counts = f"{len(kept)} found, {missing} without a clip, {len(lost) - missing} unusable"
    say(f"{len(kept) + len(lost)} questions: {counts}")
    say(f"rows in {output}" + (f"; the others, each with its reason, in {left_out}" if lost else ""))


# ---------------------------------------------------------------- any file of questions


def check(file: str, *, model: str = "", audio_dir: str = "", decode: bool = False) -> None:
    """Print all that is wrong with a file of questions, then what is in it. Exit status 1: a row is unusable.

    file: for training or a benchmark. model: whose tokenizer measures the questions; empty: none. audio_dir:
    folder of the clips; empty: beside the questions. decode: read every clip whole, not its header only.
    """
    processor = load_processor(model) if model else None
    findings = list(examine(file, audio_dir, decode, processor))
    examples = [example for _, example, _, _ in findings if example]
    sounds = [sound for _, _, sound, _ in findings if sound]
    unusable = [problem for *_, problem in findings if problem]
    times, odd = Counter(str(e.row["id"]) for e in examples if e.row.get("id") is not None), []
    for e in examples:
        if (name := e.row.get("id")) is not None and times[str(name)] > 1:
            odd.append(f"{e.location}: id {name} is there {times[str(name)]} times")
        if len(set(e.choices)) < len(e.choices):
            odd.append(f"{e.location}: an option stands twice in {e.choices}")
        if e.by_name:
            odd.append(f"{e.location}: the clip is not at its path, and {e.audio} has its file name")
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


def filter(file: str, *, predictions: str, output: str, drop: str = "right") -> None:
    """Keep the questions that a model got wrong (or right).

    predictions: evaluate.py's predictions.json for `file`; with --silence, those got wrong need the sound.
    drop: right or wrong. output: JSON Lines to write.
    """
    if drop not in ("right", "wrong"):
        raise BadInput(f"--drop {drop}: unknown, choose right or wrong")
    if os.path.exists(output):
        raise BadInput(f"{output}: already there; remove it or name another --output")
    (rows, _), (answers, _) = read_rows(file), read_rows(predictions)
    if len(answers) > len(rows):
        raise BadInput(f"{predictions}: has {len(answers)} rows, and {file} only {len(rows)}")
    kept, marks = [], Counter({None: len(rows) - len(answers)})
    old = {"model_output", "model_prediction", "completion"}  # where the rows are predictions themselves
    for (row, location), (answer, where) in zip(rows, answers):
        if isinstance(answer, dict) and "unusable" in answer:  # as evaluate.py marks what it could not read
            marks[None] += 1
            continue
        mark = judge(answer, where)
        asked = {key: row[key] for key in row if key not in old} if isinstance(row, dict) else None
        if asked is None or json.dumps(asked) != json.dumps({key: answer.get(key) for key in asked}):
            raise BadInput(f"{where}: is not about {location}; were the predictions made from this file?")
        mark = None if prediction_of(answer) is None else mark
        marks[mark] += 1
        if mark == (drop == "wrong"):
            kept.append(row)
    counts = f"{len(rows)} rows: {marks[True]} right, {marks[False]} wrong"
    counts += f", {marks[None]} left out without an answer or a prediction" if marks[None] else ""
    if not kept:
        raise BadInput(f"{predictions}: none is left of {counts}")
    write_rows(output, kept)
    say(f"{counts}; {len(kept)} in {output}")
    folder = os.path.dirname(file)
    if os.path.realpath(os.path.dirname(output)) != os.path.realpath(folder):
        say(f"its clips are looked for by --audio_dir {folder or '.'}, or another that you named")


if __name__ == "__main__":
    run_command(__doc__, hub, avqa, check, filter)
