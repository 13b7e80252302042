"""Accuracy on MMAU, or on any file of questions, scored as the benchmark does, with a 95 % interval.

accelerate launch evaluate.py --model runs/grpo --data mmau-test-mini.json --audio_dir mmau --output runs/eval
accelerate launch evaluate.py --checkpoints runs/grpo --data mmau-test-mini.json --audio_dir mmau  # the curve
accelerate launch evaluate.py --hearing --orders 4 --model ... --data ...   # does it listen?
python evaluate.py --score predictions.json                          # any model's predictions
python evaluate.py --compare a/predictions.json b/predictions.json   # is b better than a?
python evaluate.py --model runs/grpo --ask clip.wav --question "What barks?" --choices "a dog" "a seal"
"""

import json
import os
import re
import time
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import accelerate
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from transformers.hf_argparser import HfArg

from cli import BadInput, check_at_least, located, parse, progress_bar, run_main, say
from data import PROMPTS, SAMPLE_RATE, Example, check_audio, decode, is_cut, load_audio, load_examples
from data import locations, lock_folder, make_inputs, prefetch, read_clip, read_rows, to_example, window_size
from data import write_atomically
from model import DEFAULT_MODEL, completion_mask, eos_tokens, has_model, load_model, sample, unsharded
from model import weights_hash
from rewards import by_group, extract_answer, format_reward, judge, mmau_match, paired_difference
from rewards import prediction_of, score, score_hearing, score_orders
from training import Run, announce, log_metrics, warn_about_clips, warn_about_gpu

# SHA-256 of the known question files of MMAU Test-mini. A converted file has a different one
RELEASES = {
    "9f18fda99f8dbc2bc5ecd6323fb5063309f54969810b5c6f1caeb3b8d904cf1c": "MMAU Test-mini v05.15.25",
    "e8cc09223b497191781756212cb616315690aaa6ea7ac359db1b65d97d1e2433": "MMAU Test-mini v1, 25 March 2025",
}


@dataclass
class Config:
    model: str = HfArg(default=DEFAULT_MODEL, help="hub name or folder of a supported model")
    data: str = HfArg(default="", help="questions: MMAU, MMAR, or any file that training takes")
    audio_dir: str = HfArg(default="", help="folder with the clips; empty: next to the questions")
    output: str = HfArg(default="", help="folder for the results; empty: runs/eval, or eval in --checkpoints")
    prompt: str = HfArg(default="", help="plain, answer or think; empty: the model's own, else answer")
    decoding: str = HfArg(default="greedy", help="greedy, or model: sample as set in generation_config.json")
    silence: bool = HfArg(default=False, help="replace every clip with silence: how far the text alone gets")
    hearing: bool = HfArg(default=False, help="also answer with silence and with another question's clip")
    orders: int = HfArg(default=0, help="answer with this many rotations of the options; 0: as in the file")
    batch_size: int = HfArg(default=16, help="questions per forward pass")
    load_in_4bit: bool = HfArg(default=False, help="keep the model in 4 bits, as in QLoRA training")
    max_new_tokens: int = HfArg(default=256, help="maximum length of an answer")
    limit: int = HfArg(default=0, help="answer only this many questions, the first ones; 0: all")
    seed: int = HfArg(default=42, help="seed for --decoding model, and for the other clips of --hearing")
    checkpoints: str = HfArg(default="", help="a training run: evaluate each checkpoint with no results yet")
    score: str = HfArg(default="", help="a file of any model's predictions: only score it")
    compare: list[str] = HfArg(default_factory=list, help="two files of predictions: second minus first")
    ask: str = HfArg(default="", help="one clip: answer --question about it with one of --choices")
    question: str = HfArg(default="", help="for --ask")
    choices: list[str] = HfArg(default_factory=list, help="for --ask")


# ---------------------------------------------------------------- answering


@dataclass
class Questions:
    """A batch of B questions, ready for a model."""

    inputs: dict  # see make_inputs
    cut: list[bool]  # whether the clip is longer than the model's window
    errors: list[str]  # why a row cannot be used; such a row becomes an empty question about silence


@dataclass
class Prediction:
    completion: str
    cut: bool
    error: str


def read_questions(processor, examples: list[Example], prompt: str, silence: bool = False) -> Questions:
    """Read the clips of a batch and make the model inputs."""
    usable = []
    waves = []
    errors = []
    for example in examples:
        try:
            wave = read_clip(processor, example, prompt)
            errors.append("")
        except BadInput as error:
            wave = np.zeros(SAMPLE_RATE)
            example = replace(example, question="", choices=[])
            errors.append(str(error))
        usable.append(example)
        waves.append(np.zeros_like(wave) if silence else wave)
    cut = [is_cut(processor, wave) for wave in waves]
    return Questions(make_inputs(processor, usable, waves, prompt), cut, errors)


@torch.no_grad()
def answer(model, processor, questions: Questions, max_new_tokens: int, decoding="greedy"):
    """A Prediction for each question of a batch; an empty one, with its error, where a row cannot be used."""
    inputs = {name: value.to(model.device) for name, value in questions.inputs.items()}
    eos_ids = eos_tokens(model, processor)
    if decoding == "greedy":
        ids, mask = sample(model, inputs, eos_ids, max_new_tokens)  # (B, 1, T)
    else:  # by transformers, as the model's generation_config.json says
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens)
        ids = generated[:, None, inputs["input_ids"].shape[1] :]  # (B, 1, T)
        mask = completion_mask(ids, eos_ids)
    predictions = []
    for (text,), cut, error in zip(decode(processor, eos_ids, ids, mask), questions.cut, questions.errors):
        predictions.append(Prediction("" if error else text, cut, error))
    return predictions


def predict(
    config: Config, accelerator, model, processor, examples: list[Example], prompt: str, silence: bool
):
    """A prediction for each example, in order; the processes share the work, and each returns them all.

    silence: replace each clip with silence of the same length.
    """
    size = config.batch_size
    starts = list(range(0, len(examples), size))[accelerator.process_index :: accelerator.num_processes]
    thread_processor = deepcopy(processor)  # a tokenizer must not be used by two threads at once

    def read(start: int) -> Questions:
        return read_questions(thread_processor, examples[start : start + size], prompt, silence)

    found = []
    progress = progress_bar(starts, desc="answering", disable=not accelerator.is_main_process)
    for start, questions in zip(progress, prefetch(read, starts)):
        torch.manual_seed(config.seed + start)  # for --decoding model
        with located(f"batch of {locations(examples[start : start + size])}", BadInput):
            predictions = answer(model, processor, questions, config.max_new_tokens, config.decoding)
        found += enumerate(predictions, start)
    found = sorted(gather_object(found), key=lambda item: item[0])
    return [prediction for _, prediction in found]


def with_other_clips(examples: list[Example], seed: int) -> list[Example]:
    """Each question with the clip of another question with a different answer, picked by the seed.

    Raises BadInput if there is none. A row that has no answer or cannot be used stays as it is.
    """
    answered = [example for example in examples if not example.problem and example.answer is not None]
    sources = [example for example in answered if os.path.isfile(example.audio)]
    order = np.random.default_rng(seed).permutation(len(sources))
    sources = [sources[i] for i in order]
    changed = []
    for number, example in enumerate(examples):
        if example.problem or example.answer is None:
            changed.append(example)
            continue
        start = number % max(1, len(sources))  # so that the questions get different clips
        for source in sources[start:] + sources[:start]:
            same_answer = source.answer.strip().lower() == example.answer.strip().lower()
            if not same_answer and source.audio != example.audio:
                break
        else:
            raise BadInput(f"--hearing: {example.location}: no other question has another answer and clip")
        changed.append(replace(example, audio=source.audio))
    return changed


def with_rotated_options(examples: list[Example], shift: int) -> list[Example]:
    """Each question with its options moved up by `shift` places; the first ones go to the end."""
    rotated = []
    for example in examples:
        choices = example.choices[shift:] + example.choices[:shift]
        rotated.append(replace(example, choices=choices))
    return rotated


def log_held_out_accuracy(run: Run, step: int) -> None:
    """Measure the policy on the held-out questions, and once more with silence; print and log both."""
    accuracy = held_out_accuracy(run)
    metrics = {"eval_accuracy": accuracy}
    text = f"step {step}: held-out accuracy {accuracy:.1%}"
    if run.config.eval_silence:
        silent = held_out_accuracy(run, silence=True)
        metrics["eval_accuracy_silent"] = silent
        text += f", with silence {silent:.1%}"
    if run.signals:  # cut short: the resumed run measures it again
        return
    announce(run, text)
    log_metrics(run, step, metrics)


def held_out_accuracy(run: Run, silence: bool = False) -> float:
    """Accuracy of the policy during training; the processes share the work. A signal ends it early."""
    config = run.config
    accelerator = run.accelerator
    mine = run.eval_examples[accelerator.process_index :: accelerator.num_processes]
    size = config.eval_batch_size
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    processor = deepcopy(run.processor)  # a tokenizer must not be used by two threads at once
    problem = None
    correct = 0.0

    run.policy.eval()
    with accelerator.autocast(), unsharded(run.policy):
        ahead = prefetch(lambda batch: read_questions(processor, batch, config.prompt, silence), batches)
        for batch, questions in zip(batches, ahead):
            if run.signals:
                break
            try:
                with located(f"batch of {locations(batch)}", BadInput):
                    predictions = answer(run.model, run.processor, questions, config.max_new_tokens)
                for prediction in predictions:
                    if prediction.error and not config.skip_bad_audio:
                        raise BadInput(prediction.error)
            except BadInput as error:
                problem = error
                break
            for example, prediction in zip(batch, predictions):
                text = extract_answer(prediction.completion, config.prompt)
                correct += mmau_match(text, example.answer, example.choices)

    # the processes wait for each other here, so errors are raised only now, by all of them together
    totals = torch.tensor([correct, float(problem is not None)], device=accelerator.device)
    correct, failures = accelerator.reduce(totals).tolist()
    if failures:
        raise problem or BadInput("another process could not evaluate the held-out questions")
    return correct / len(run.eval_examples)


def prompt_of(config: Config, model: str) -> str:
    """--prompt, else the prompt that our checkpoint was trained with, else the default."""
    prompt = config.prompt or read_json(os.path.join(model, "run.json")).get("prompt", "answer")
    if prompt not in PROMPTS:
        raise BadInput(f"--prompt {prompt}: unknown, choose one of {', '.join(PROMPTS)}")
    return prompt


def four_bit_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """The compute dtype for 4-bit weights; None without --load_in_4bit."""
    if not config.load_in_4bit:
        return None
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def ask(config: Config) -> None:
    """Answer one question about one clip in the terminal."""
    row = {"audio": config.ask, "question": config.question, "choices": config.choices}
    with located("--ask"):
        example = replace(to_example(row, "--ask", ""), audio=config.ask)
        load_audio(example.audio)  # check it before loading the model
    prompt = prompt_of(config, config.model)
    device = Accelerator().device
    model, processor = load_model(config.model, four_bit_dtype=four_bit_dtype(config, device))
    model.to(device).eval()
    questions = read_questions(processor, [example], prompt, config.silence)
    (prediction,) = answer(model, processor, questions, config.max_new_tokens, config.decoding)
    if prediction.error:
        raise BadInput(prediction.error)
    text = extract_answer(prediction.completion, prompt)
    is_option = text in [choice.strip() for choice in example.choices]
    say(prediction.completion)
    say(f"answer: {text} ({'one' if is_option else 'not one'} of the options)")
    if prediction.cut:
        say(f"(only the first {window_size(processor) / SAMPLE_RATE:.0f} s were used)")


# ---------------------------------------------------------------- evaluating a model


def evaluate(config: Config, accelerator, examples: list[Example], digest: str, path: str, folder: str):
    """Answer and score the questions with the model at `path`; writes predictions.json and results.json."""
    started = time.perf_counter()
    prompt = prompt_of(config, path)
    lock = lock_folder(folder) if accelerator.is_main_process else None  # noqa: F841, held to the end
    accelerator.wait_for_everyone()
    others = with_other_clips(examples, config.seed) if config.hearing else []
    model, processor = load_model(path, four_bit_dtype=four_bit_dtype(config, accelerator.device))
    model.to(accelerator.device).eval()

    def answer_all(asked: list[Example], silence: bool) -> list[Prediction]:
        return predict(config, accelerator, model, processor, asked, prompt, silence)

    predictions = answer_all(examples, config.silence)
    if config.hearing:
        with_silence = answer_all(examples, silence=True)
        with_other_clip = answer_all(others, silence=False)
    rotations = [predictions]  # rotations[k]: options moved up by k places
    for shift in range(1, config.orders):
        rotations.append(answer_all(with_rotated_options(examples, shift), config.silence))

    if accelerator.is_main_process:

        def answer_of(prediction: Prediction) -> str | None:
            return None if prediction.error else extract_answer(prediction.completion, prompt)

        rows = []
        for i, (example, prediction) in enumerate(zip(examples, predictions)):
            text = extract_answer(prediction.completion, prompt)
            # the benchmark's own script has used both keys
            row = example.row | {"model_output": text, "model_prediction": text}
            row["completion"] = prediction.completion
            if example.problem:
                row["unusable"] = example.problem
            if config.hearing:
                row["silence_output"] = answer_of(with_silence[i])
                row["other_output"] = answer_of(with_other_clip[i])
                row["other_audio"] = others[i].audio
            if config.orders:
                # with fewer options than --orders, the last rotations are repeats
                answers = [answer_of(rotation[i]) for rotation in rotations]
                row["order_outputs"] = answers[: len(example.choices)]
            rows.append(row)
        target = os.path.join(folder, "predictions.json")
        write_json(target, rows)
        packages = (torch, transformers, accelerate)
        malformed = sum(format_reward(prediction.completion, prompt) == 0 for prediction in predictions)
        located_rows = [(row, example.location) for row, example in zip(rows, examples)]
        results = score(located_rows) | score_hearing(located_rows) | score_orders(located_rows)
        results |= {
            "unparseable": malformed / len(rows),
            "over_length": sum(prediction.cut for prediction in predictions),
            "unreadable": [prediction.error for prediction in predictions if prediction.error],
            "model": path,
            "weights_hash": weights_hash(model),
            **comparable_settings(config, prompt, digest),
            "data": config.data,
            "batch_size": config.batch_size,
            "predictions_sha256": read_rows(target)[1],
            "processes": accelerator.num_processes,
            "seconds": round(time.perf_counter() - started, 3),
            "versions": {package.__name__: package.__version__ for package in packages},
        }
        write_json(os.path.join(folder, "results.json"), results)
        show(results, os.path.join(folder, "results.json"))
    accelerator.wait_for_everyone()


def comparable_settings(config: Config, prompt: str, digest: str) -> dict:
    """The settings that two results must share to be comparable."""
    names = ("decoding", "silence", "hearing", "orders", "max_new_tokens", "limit", "seed", "load_in_4bit")
    settings = {"prompt": prompt, **{name: getattr(config, name) for name in names}}
    # absolute, so that tools.report finds the clips from any folder
    settings["audio_dir"] = os.path.abspath(config.audio_dir or os.path.dirname(config.data))
    return settings | {"data_sha256": digest, "release": RELEASES.get(digest, "unknown")}


def evaluate_checkpoints(config: Config, accelerator, examples: list[Example], digest: str) -> None:
    """Evaluate each complete checkpoint of a run that has no results yet, then print the curve."""
    checkpoints = {}
    for path in Path(config.checkpoints).glob("checkpoint-*"):
        if re.search(r"-\d+$", path.name) and has_model(path):
            checkpoints[int(path.name.rsplit("-", 1)[1])] = path
    if not checkpoints:
        raise BadInput(f"--checkpoints {config.checkpoints}: contains no complete checkpoint-N")

    output = Path(config.output or os.path.join(config.checkpoints, "eval"))
    todo = []
    for step, path in sorted(checkpoints.items()):
        results = output / path.name / "results.json"
        done = read_json(results)
        if not done:
            todo.append(step)
            continue
        wanted = comparable_settings(config, prompt_of(config, str(path)), digest)
        if config.output:  # else the results are inside the run's folder, which may move
            wanted["model"] = str(path)
        other = [name for name in wanted if done.get(name) != wanted[name]]
        saved = max(file.stat().st_mtime for file in path.glob("*config.json"))
        if saved > results.stat().st_mtime:
            other.append("run, which was in this folder before")
        if other:
            raise BadInput(f"{results.parent}: made with another {', '.join(other)}; name another --output")

    accelerator.wait_for_everyone()  # until all processes have seen which results exist
    for step in todo:
        accelerator.print(f"checkpoint-{step}")
        path = checkpoints[step]
        evaluate(config, accelerator, examples, digest, str(path), str(output / path.name))
    if accelerator.is_main_process:
        curve = {}
        for step, path in sorted(checkpoints.items()):
            curve[step] = read_json(output / path.name / "results.json")
        show_curve(curve)


def show_curve(curve: dict[int, dict]) -> None:
    """Print accuracy and interval for each step."""
    if not all(results["total"] for results in curve.values()):
        return
    best = max(curve, key=lambda step: curve[step]["accuracy"])
    say(f"\n{'step':>6} accuracy   95 % interval")
    for step, results in curve.items():
        low, high = results["interval"]
        mark = "  <- best" if step == best else ""
        say(f"{step:>6} {results['accuracy']:8.1%}   {100 * low:5.1f} to {100 * high:5.1f}{mark}")
    say("the best was picked on the questions it is scored on, so it is optimistic: report the whole curve")


# ---------------------------------------------------------------- results


def read_json(path) -> dict:
    """A JSON object from a file; empty if there is none."""
    with suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        value = json.load(file)
        if isinstance(value, dict):
            return value
    return {}


def write_json(path: str, value) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def show(results: dict, target: str) -> None:
    """Print the table, and notes on how to read its numbers."""

    def show_line(name, part):
        low, high = part["interval"]
        counts = f"{part['correct']} of {part['total']}"
        say(f"{name:<40} {part['accuracy']:8.1%}   {100 * low:5.1f} to {100 * high:5.1f}   {counts:>14}")

    if results["total"]:
        say(f"{'':<40} accuracy   95 % interval          correct")
        show_line("overall", results)
        for key, group in results["by"].items():
            if group:
                say(key)
            for name, part in group.items():
                show_line(f"  {name}", part)
    else:
        say("the file has no answers, so there is nothing to score")
    if "audio_gain" in results:
        show_audio_gain(results["audio_gain"])
    if "option_order" in results:
        show_option_order(results["option_order"])

    notes = {
        "unanswered": "rows have no answer to compare with and are not in the score",
        "missing": "rows have no prediction and count as wrong (the benchmark's script may leave them out)",
        "letters": "predictions are a letter or an index, but MMAU's rule wants the option's text",
        "odd_answers": "rows have an answer that is not among their options, such as a letter or an index",
        "over_length": "clips are longer than the model's window; the rest was cut",
    }
    for name, text in notes.items():
        if results.get(name) and results["total"]:
            say(f"{results[name]} {text}")
    unreadable = results.get("unreadable")
    if unreadable:
        say(f"{len(unreadable)} rows or clips could not be read and count as wrong:")
        for error in unreadable[:10]:
            say(f"  {error}")
        if len(unreadable) > 10:
            say(f"  ... all of them in {target}")
    if results.get("unparseable"):
        say(f"{results['unparseable']:.1%} of the completions are not in the format that the prompt asks for")
    if results.get("model"):
        silence = ", clips replaced by silence" if results["silence"] else ""
        say(f"model {results['model']}, prompt {results['prompt']}, decoding {results['decoding']}{silence}")
    release = results.get("release", "unknown")
    say(f"questions {results['data']}, release {release}, SHA-256 {results['data_sha256']}")
    say(f"results in {target}")


def show_audio_gain(hearing: dict) -> None:
    """Print the accuracy with the clip, with silence and with another clip, and what the clip adds."""

    def show_line(name, part):
        accuracies = ""
        for key in ("clip", "silence", "other"):
            accuracies += f"{100 * part[key]['accuracy']:8.1f}"
        gains = ""
        for key in ("gain_over_silence", "gain_over_other"):
            low, high = part[key]["interval"]
            gain = part[key]["gain"]
            gains += f"   {100 * gain:+6.1f} ({100 * low:+6.1f} to {100 * high:+6.1f})"
        say(f"{name:<12}{accuracies}{gains}   {part['total']:5}")

    heads = "    clip silence   other   clip minus silence           clip minus other clip         rows"
    say(f"{'hearing, %':<12}{heads}")
    show_line("overall", hearing)
    for name, part in hearing["by_task"].items():
        show_line(f"  {name}", part)


def show_option_order(orders: dict) -> None:
    """Print how the order of the options affects accuracy."""
    low, high = orders["interval"]
    accuracy = f"{orders['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})"
    say(f"{orders['orders']} orders of the options, {orders['total']} questions: mean accuracy {accuracy}")
    say(f"  same answer in all orders: {orders['alike']:.1%}")
    for place, part in orders["by_place"].items():
        low, high = part["interval"]
        interval = f"({100 * low:.1f} to {100 * high:.1f})"
        say(f"  right option at position {place}: {part['accuracy']:.1%} {interval} of {part['total']}")


def count_missing(path: str, rows: list[tuple[dict, str]]) -> int:
    """Number of rows without a prediction. Raises BadInput if no row has one."""
    missing = sum(prediction_of(row) is None for row, _ in rows)
    if missing == len(rows):
        raise BadInput(f"{path}: no row has a prediction (key 'model_output' or 'model_prediction')")
    return missing


def score_file(path: str) -> None:
    """Score a file of predictions. What its results.json already says about the evaluation is kept."""
    rows, digest = read_rows(path)
    results = score(rows) | score_hearing(rows) | score_orders(rows)
    count_missing(path, rows)
    name = os.path.splitext(os.path.basename(path))[0]
    name = "results.json" if name == "predictions" else f"{name}.results.json"
    target = os.path.join(os.path.dirname(path), name)
    known = read_json(target)
    if known.get("predictions_sha256") != digest:
        known = {"data": path, "data_sha256": digest, "release": RELEASES.get(digest, "unknown")}
        known |= {"unparseable": None, "over_length": None, "unreadable": None}
    results = known | results | {"predictions_sha256": digest}
    write_json(target, results)
    show(results, target)


# ---------------------------------------------------------------- comparing

# what identifies a question in a file of predictions
QUESTION_KEYS = ("id", "audio", "audio_path", "audio_id", "video_name", "question", "question_text")
QUESTION_KEYS += ("choices", "multi_choice", "answer", "unusable")


def read_marks(path: str) -> dict[str, tuple[dict, bool | None]]:
    """Rows of a file of predictions and whether they are correct, keyed by question."""
    marks = {}
    rows, _ = read_rows(path)
    for row, location in rows:
        mark = judge(row, location)
        question = json.dumps([row.get(key) for key in QUESTION_KEYS])
        if question in marks:
            raise BadInput(f"{location}: the same question as an earlier row, so answers cannot be paired")
        marks[question] = row, mark
    if missing := count_missing(path, rows):
        say(f"{path}: {missing} rows have no prediction and count as wrong")
    return marks


def compare(paths: list[str]) -> None:
    """Print how two files of predictions for the same questions differ, overall and by task."""
    if len(paths) != 2:
        raise BadInput(f"--compare takes two files of predictions, not {len(paths)}")
    first, second = map(read_marks, paths)
    shared = [question for question in first if question in second]
    if not shared:
        raise BadInput(f"{paths[0]} and {paths[1]} have no question in common")
    only_first, only_second = len(first) - len(shared), len(second) - len(shared)
    if only_first or only_second:
        where = f"{only_first} are only in the first file, {only_second} only in the second"
        say(f"{len(shared)} questions are in both files and are compared; {where}")
    rows = []
    pairs = []
    for question in shared:
        row, mark = first[question]
        rows.append(row)
        pairs.append(None if mark is None else (mark, second[question][1]))
    if not any(pairs):
        raise BadInput(f"{paths[0]}: has no answers to compare with")

    def show_line(name, pairs):
        before = 100 * sum(pair[0] for pair in pairs) / len(pairs)
        after = 100 * sum(pair[1] for pair in pairs) / len(pairs)
        d, low, high, p = paired_difference(pairs)
        interval = f"{100 * low:+6.1f} to {100 * high:+6.1f}"
        say(f"{name:<20} {before:6.1f} {after:6.1f}  {100 * d:+6.1f}   {interval}   {p:8.2g}   {len(pairs)}")

    say(f"first: {paths[0]}\nsecond: {paths[1]}")
    say(f"{'accuracy in %':<20}  first second  second-first  95 % interval   McNemar p   rows")
    show_line("overall", [pair for pair in pairs if pair])
    for name, part in by_group(rows, pairs)["task"].items():
        show_line(f"  {name}", part)


def main() -> None:
    config = parse(Config, __doc__)
    modes = [mode for mode in ("checkpoints", "score", "compare", "ask") if getattr(config, mode)]
    if len(modes) > 1:
        raise BadInput(f"--{modes[0]} and --{modes[1]} cannot be combined: choose one")
    if config.decoding not in ("greedy", "model"):
        raise BadInput(f"--decoding {config.decoding}: unknown, choose greedy or model")
    check_at_least(config, max_new_tokens=1, batch_size=1, limit=0, seed=0, orders=0)
    if config.hearing and config.silence:
        raise BadInput("--hearing and --silence cannot be combined: --hearing already measures silence")
    if config.score:
        return score_file(config.score)
    if config.compare:
        return compare(config.compare)
    if config.ask:
        return ask(config)

    if not config.data:
        raise BadInput("--data is missing: the file of questions")
    examples, digest = load_examples(config.data, config.audio_dir, for_training=False)
    if config.limit:
        examples = examples[: config.limit]
    check_audio(examples, skip=True)
    output = config.output or "runs/eval"
    target = os.path.join(output, "predictions.json")
    if not config.checkpoints and os.path.exists(target):
        raise BadInput(f"{target}: already exists; remove it or name another --output")
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # the processes finish at different times
    accelerator = Accelerator(kwargs_handlers=[timeout])
    warn_about_gpu(accelerator)
    if accelerator.is_main_process:
        warn_about_clips(examples)
    accelerator.wait_for_everyone()  # until all processes have seen that there are no predictions yet
    if config.checkpoints:
        evaluate_checkpoints(config, accelerator, examples, digest)
    else:
        evaluate(config, accelerator, examples, digest, config.model, output)
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
