"""Accuracy on MMAU, or on any file of questions, scored as the benchmark does, and how sure the number is.

accelerate launch evaluate.py --model runs/grpo --data mmau-test-mini.json --audio_dir mmau --output runs/eval
accelerate launch evaluate.py --checkpoints runs/grpo --data mmau-test-mini.json --audio_dir mmau  # the curve
python evaluate.py --score predictions.json                          # any model's predictions
python evaluate.py --compare a/predictions.json b/predictions.json   # is b better than a?
python evaluate.py --model runs/grpo --ask clip.wav --question "What barks?" --choices "a dog" "a seal"
"""

import glob
import json
import os
import re
import time
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NamedTuple

import accelerate
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data import PROMPTS, SAMPLE_RATE, BadInput, Example, blame, check_audio, decode, is_cut, load_audio
from data import load_examples, lock_folder, made_ahead, make_batch, read_clip, read_log, read_rows, sha256
from data import to_example, window, write_whole
from flags import check_at_least, parse, run_main, say, warn_of_a_gpu_not_found, warn_of_clips_by_name
from model import DEFAULT_MODEL, LOADABLE, NotFinite, completion_mask, eos_tokens, load_model, sample
from policy import weights_hash, with_whole_weights
from rewards import by_group, extract_answer, format_reward, judge, mmau_match, paired_difference
from rewards import prediction_of, score
from training import Run


@dataclass
class Config:
    model: str = HfArg(default=DEFAULT_MODEL, help="hub name or folder of a supported model")
    data: str = HfArg(default="", help="questions: MMAU, MMAR, or any file that training takes")
    audio_dir: str = HfArg(default="", help="folder of the clips; empty: beside the questions")
    output: str = HfArg(default="", help="folder for the results; empty: runs/eval, or eval in --checkpoints")
    prompt: str = HfArg(default="", help="plain, answer or think; empty: the model's own, else answer")
    decoding: str = HfArg(default="greedy", help="greedy; or model: sample as generation_config.json says")
    silence: bool = HfArg(default=False, help="replace every clip by silence: what the text alone gives away")
    batch_size: int = HfArg(default=16, help="questions answered together")
    max_new_tokens: int = HfArg(default=256, help="of an answer")
    limit: int = HfArg(default=0, help="answer only the first so many questions; 0: all")
    seed: int = HfArg(default=42, help="of --decoding model")
    checkpoints: str = HfArg(default="", help="a training run: evaluate each checkpoint without results")
    score: str = HfArg(default="", help="predictions of any model: only score them")
    compare: list[str] = HfArg(default_factory=list, help="two files of predictions: second minus first")
    ask: str = HfArg(default="", help="one clip, to answer --question with one of --choices")
    question: str = HfArg(default="", help="for --ask")
    choices: list[str] = HfArg(default_factory=list, help="for --ask")


# ---------------------------------------------------------------- answering


class Prediction(NamedTuple):
    completion: str
    cut: bool = False  # the clip is longer than the model hears
    error: str = ""  # why the clip could not be read


@torch.no_grad()
def generate(model, inputs: dict, eos_ids: list[int], max_new_tokens: int):
    """ids (B, 1, T) and their mask, by transformers, as the model's generation_config.json says."""
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens)[:, None, inputs["input_ids"].shape[1] :]
    return ids, completion_mask(ids, eos_ids)


class Asked(NamedTuple):
    """A batch of questions as a model takes it."""

    inputs: dict
    cut: list[bool]
    errors: list[str]
    locations: list[str]


def prepare(processor, batch: list[Example], prompt: str, silence: bool = False) -> Asked:
    """Read the clips of a batch and make the inputs; a row that cannot be used becomes an empty question."""
    asked, waves, errors = [], [], []
    for example in batch:
        try:
            wave, error = read_clip(processor, example, prompt), ""
        except BadInput as bad:
            example, wave, error = replace(example, question="", choices=[]), np.zeros(SAMPLE_RATE), str(bad)
        asked.append(example)
        waves.append(np.zeros_like(wave) if silence else wave)
        errors.append(error)
    cut = [is_cut(processor, wave) for wave in waves]
    return Asked(make_batch(processor, asked, waves, prompt), cut, errors, [e.location for e in batch])


def predict(model, processor, asked: Asked, max_new_tokens: int, decoding="greedy") -> list[Prediction]:
    """A prediction for each question of a batch; an empty one, with its error, where a row cannot be used."""
    inputs = {name: value.to(model.device) for name, value in asked.inputs.items()}
    eos_ids = eos_tokens(model, processor)
    try:
        answer = sample if decoding == "greedy" else generate
        ids, mask = answer(model, inputs, eos_ids, max_new_tokens)  # (B, 1, T)
    except NotFinite as error:
        location = asked.locations[error.args[0]]
        raise BadInput(f"{location}: the model's logits are not finite numbers") from None
    texts = [text for (text,) in decode(processor, eos_ids, ids, mask)]
    return [Prediction("" if e else text, cut, e) for text, cut, e in zip(texts, asked.cut, asked.errors)]


def held_out_accuracy(run: Run) -> float:
    """Accuracy of a policy in training; every process answers its part, until it is interrupted."""
    config, accelerator, problems = run.config, run.accelerator, []
    examples = run.eval_examples[accelerator.process_index :: accelerator.num_processes]
    size, processor = config.eval_batch_size, deepcopy(run.processor)  # not to be used by two threads at once
    batches = [examples[i : i + size] for i in range(0, len(examples), size)]

    def count_correct() -> int:
        correct = 0
        ahead = made_ahead(lambda batch: prepare(processor, batch, config.prompt), batches)
        for batch, asked in zip(batches, ahead):
            try:
                predictions = predict(run.model, run.processor, asked, config.max_new_tokens)
            except BadInput as error:
                problems.append(error)
            if problems or run.interrupted.number:
                break
            problems.extend(BadInput(p.error) for p in predictions if p.error and not config.skip_bad_audio)
            answers = [extract_answer(p.completion, config.prompt) for p in predictions]
            correct += sum(mmau_match(answer, e.answer, e.choices) for answer, e in zip(answers, batch))
        return correct

    run.policy.eval()
    with accelerator.autocast():
        correct = with_whole_weights(run.policy, count_correct)
    correct = accelerator.reduce(torch.tensor(float(correct), device=accelerator.device))
    if problems:  # said after what all processes do together
        raise problems[0]
    return correct.item() / len(run.eval_examples)


def prompt_style(config: Config, model: str) -> str:
    """--prompt, else the style that a checkpoint of ours was trained with, else the default."""
    prompt = config.prompt or read_json(os.path.join(model, "run.json")).get("prompt", "answer")
    if prompt not in PROMPTS:
        raise BadInput(f"--prompt {prompt}: unknown, choose one of {', '.join(PROMPTS)}")
    return prompt


# ---------------------------------------------------------------- scoring


def read_json(path: str) -> dict:
    """What an earlier run left in a file; nothing where there is none."""
    with suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        if isinstance(value := json.load(file), dict):
            return value
    return {}


def write_json(path: str, value) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def show(results: dict, target: str) -> None:
    """The table on the terminal, and what a reader of its numbers must know."""

    def line(name, part):
        low, high = part["interval"]
        counts = f"{part['correct']} of {part['total']}"
        say(f"{name:<40} {part['accuracy']:8.1%}   {100 * low:5.1f} to {100 * high:5.1f}   {counts:>14}")

    if results["total"]:
        say(f"{'':<40} accuracy   95 % interval          correct")
        line("overall", results)
        for key, group in results["by"].items():
            if group:
                say(key)
                for name, part in group.items():
                    line(f"  {name}", part)
    else:
        say("the file has no answers, so there is nothing to score")
    notes = {
        "unanswered": "rows have no answer to compare with and are not in the score",
        "missing": "rows have no prediction and count as wrong (the benchmark's script may leave them out)",
        "odd_answers": "rows have an answer that is none of their options, as a letter or an index would be",
        "over_length": "clips are longer than the model's window; the rest was cut",
    }
    for name, text in notes.items():
        if results.get(name) and results["total"]:
            say(f"{results[name]} {text}")
    if results.get("unreadable"):
        say(f"{len(results['unreadable'])} rows or clips could not be read, and count as wrong:")
        say("\n".join(f"  {error}" for error in results["unreadable"][:10]))
        if len(results["unreadable"]) > 10:
            say(f"  ... all of them in {target}")
    if results.get("unparseable"):
        say(f"{results['unparseable']:.1%} of the completions are not in the format that was asked for")
    if results.get("model"):
        silence = ", clips replaced by silence" if results["silence"] else ""
        say(f"model {results['model']}, prompt {results['prompt']}, decoding {results['decoding']}{silence}")
    say(f"questions {results['data']}, SHA-256 {results['data_sha256']}")
    say(f"results in {target}")


def count_missing(path: str, rows: list[tuple[dict, str]]) -> int:
    """How many rows have no prediction. Raises BadInput if that is all of them."""
    missing = sum(prediction_of(row) is None for row, _ in rows)
    if missing == len(rows):
        raise BadInput(f"{path}: no row has a prediction (key 'model_output' or 'model_prediction')")
    return missing


def score_file(path: str) -> None:
    """Score a file of predictions. What only the run that made it knew stays in its results.json."""
    rows, digest = read_rows(path)
    results = score(rows)
    count_missing(path, rows)
    name = os.path.splitext(os.path.basename(path))[0]
    name = "results.json" if name == "predictions" else f"{name}.results.json"
    target = os.path.join(os.path.dirname(path), name)
    known = read_json(target)
    if known.get("predictions_sha256") != digest:
        known = {"data": path, "data_sha256": digest}
        known |= {"unparseable": None, "over_length": None, "unreadable": None}
    results = known | results | {"predictions_sha256": digest}
    write_json(target, results)
    show(results, target)


# ---------------------------------------------------------------- comparing


def read_marks(path: str) -> dict[str, tuple[dict, bool | None]]:
    """Rows of a file of predictions and whether they are right, by what identifies their questions."""
    keys = ("id", "audio", "audio_path", "audio_id", "video_name", "question", "question_text", "choices")
    keys += ("multi_choice", "answer", "unusable")
    marks = {}
    rows, _ = read_rows(path)
    for row, location in rows:
        mark, question = judge(row, location), json.dumps([row.get(key) for key in keys])
        if question in marks:
            problem = "the same question as in a row before it, so answers cannot be paired"
            raise BadInput(f"{location}: {problem}")
        marks[question] = row, mark
    if missing := count_missing(path, rows):
        say(f"{path}: {missing} rows have no prediction and count as wrong")
    return marks


def compare(paths: list[str]) -> None:
    """Print how two files of predictions for the same questions differ, overall and by task."""
    if len(paths) != 2:
        raise BadInput(f"--compare takes two files of predictions, not {len(paths)}")
    first, second = map(read_marks, paths)
    if first.keys() != second.keys():
        only = len(first.keys() - second.keys()), len(second.keys() - first.keys())
        where = f"{only[0]} are only in the first, {only[1]} in the second"
        raise BadInput(f"{paths[0]} and {paths[1]} hold different questions: {where}")
    rows = [row for row, _ in first.values()]
    pairs = [None if mark is None else (mark, second[key][1]) for key, (_, mark) in first.items()]
    if not any(pairs):
        raise BadInput(f"{paths[0]}: has no answers to compare with")

    def line(name, pairs):
        first, second = (100 * sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
        d, low, high, p = paired_difference(pairs)
        interval = f"{100 * low:+6.1f} to {100 * high:+6.1f}"
        say(f"{name:<20} {first:6.1f} {second:6.1f}  {100 * d:+6.1f}   {interval}   {p:8.2g}   {len(pairs)}")

    say(f"first: {paths[0]}\nsecond: {paths[1]}")
    say(f"{'accuracy in %':<20}  first second  second-first  95 % interval   McNemar p   rows")
    line("overall", [pair for pair in pairs if pair])
    for name, part in by_group(rows, pairs)["task"].items():
        line(f"  {name}", part)


# ---------------------------------------------------------------- runs


def evaluate(config: Config, accelerator, examples: list[Example], digest: str, path: str, folder: str):
    """Answer and score the questions with the model at `path`; writes predictions.json and results.json.

    Answers are kept as they come, and a second call goes on from there.
    """
    began, is_main = time.perf_counter(), accelerator.is_main_process
    prompt, target = prompt_style(config, path), os.path.join(folder, "predictions.json")
    lock = lock_folder(folder) if is_main else None  # noqa: F841, held to the end
    accelerator.wait_for_everyone()
    model, processor = load_model(path)
    how = settings(config, prompt, digest) | {"model": path, "weights_hash": weights_hash(model)}
    how |= {"batch_size": config.batch_size}
    answered = earlier_answers(folder, how)
    accelerator.wait_for_everyone()  # until all have read them
    model.to(accelerator.device).eval()
    starts = range(0, len(examples), config.batch_size)
    batches = [range(len(examples))[i : i + config.batch_size] for i in starts]
    left = [batch for batch in batches if not answered.keys() >= set(batch)]
    with open(os.path.join(folder, f"answers-{accelerator.process_index}.jsonl"), "a") as file:
        file.write("\n" + json.dumps(how) + "\n")  # a killed call may have left half a line
        mine = left[accelerator.process_index :: accelerator.num_processes]
        second = deepcopy(processor)  # a tokenizer is not to be used by two threads at once
        ahead = made_ahead(lambda b: prepare(second, [examples[i] for i in b], prompt, config.silence), mine)
        for batch, asked in zip(tqdm(mine, desc="answering", disable=not is_main), ahead):
            torch.manual_seed(config.seed + batch[0])  # for --decoding model
            predictions = predict(model, processor, asked, config.max_new_tokens, config.decoding)
            answered |= zip(batch, predictions)
            file.write("".join(json.dumps([i, *answered[i]]) + "\n" for i in batch))
            file.flush()
    answered = dict(gather_object(list(answered.items())))
    if is_main:
        predictions = [answered[i] for i in range(len(examples))]
        rows = []
        for example, (completion, *_) in zip(examples, predictions):
            answer = extract_answer(completion, prompt)
            # both keys that the benchmark's own script has used
            row = example.row | {"model_output": answer, "model_prediction": answer, "completion": completion}
            rows.append(row | ({"unusable": example.problem} if example.problem else {}))
        write_json(target, rows)
        packages = torch, transformers, accelerate
        results = score([(row, example.location) for row, example in zip(rows, examples)]) | {
            "unparseable": sum(format_reward(p.completion, prompt) == 0 for p in predictions) / len(rows),
            "over_length": sum(p.cut for p in predictions),
            "unreadable": [p.error for p in predictions if p.error],
            **how,
            "data": config.data,
            "predictions_sha256": sha256(target),
            "processes": accelerator.num_processes,
            "seconds": round(time.perf_counter() - began, 3),
            "versions": {package.__name__: package.__version__ for package in packages},
        }
        write_json(os.path.join(folder, "results.json"), results)
        for file in answer_files(folder):
            os.remove(file)
        show(results, os.path.join(folder, "results.json"))
    accelerator.wait_for_everyone()


def earlier_answers(folder: str, how: dict) -> dict[int, Prediction]:
    """Answers, by index of the question, of an evaluation that did not finish. Refuses those of another."""
    answered = {}
    for path in answer_files(folder):
        for value in read_log(path):
            if isinstance(value, list):
                index, prediction = value[0], Prediction(*value[1:])
                if not prediction.error:  # else its clip may be there by now
                    answered[index] = prediction
            elif changed := [name for name in how if value.get(name) != how[name]]:
                ways = "remove it, or name another --output"
                raise BadInput(f"{path}: answers made with another {', '.join(changed)}; {ways}")
    return answered


def answer_files(folder: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(folder), "answers-*.jsonl"))


def settings(config: Config, prompt: str, digest: str) -> dict:
    """What makes two results comparable."""
    same = ("audio_dir", "decoding", "silence", "max_new_tokens", "limit", "seed")
    return {"prompt": prompt, **{name: getattr(config, name) for name in same}, "data_sha256": digest}


def evaluate_checkpoints(config: Config, accelerator, examples: list[Example], digest: str) -> None:
    """Evaluate each complete checkpoint of a run that has no results yet, then show the curve."""
    pattern = os.path.join(glob.escape(config.checkpoints), "checkpoint-*")
    paths = {os.path.dirname(path) for name in LOADABLE for path in glob.glob(os.path.join(pattern, name))}
    paths = {int(path.split("-")[-1]): path for path in paths if re.search(r"-\d+$", path)}
    if not paths:
        raise BadInput(f"--checkpoints {config.checkpoints}: holds no complete checkpoint-N")
    output = config.output or os.path.join(config.checkpoints, "eval")
    folders = {step: os.path.join(output, f"checkpoint-{step}") for step in sorted(paths)}

    def read_curve():
        return {step: read_json(os.path.join(folder, "results.json")) for step, folder in folders.items()}

    curve = read_curve()
    for step, done in curve.items():
        if not done:
            continue
        wanted = settings(config, prompt_style(config, paths[step]), digest)
        wanted |= {"model": paths[step]} if config.output else {}  # else they lie in the run, which may move
        other = [name for name in wanted if done.get(name) != wanted[name]]
        saved = max(map(os.path.getmtime, glob.glob(os.path.join(glob.escape(paths[step]), "*config.json"))))
        if saved > os.path.getmtime(os.path.join(folders[step], "results.json")):
            other.append("run, which was here before")
        if other:
            raise BadInput(f"{folders[step]}: made with another {', '.join(other)}; name another --output")
    accelerator.wait_for_everyone()  # until all have seen what there is
    for step, done in curve.items():
        if not done:
            accelerator.print(f"checkpoint-{step}")
            evaluate(config, accelerator, examples, digest, paths[step], folders[step])
    if accelerator.is_main_process:
        show_curve(read_curve())


def show_curve(curve: dict[int, dict]) -> None:
    """Accuracy and interval of each step as a chart of characters."""
    if not all(results["total"] for results in curve.values()):
        return
    best = max(curve, key=lambda step: curve[step]["accuracy"])
    left = min(results["interval"][0] for results in curve.values())
    width = max(results["interval"][1] for results in curve.values()) - left
    say(f"\n{'step':>6} accuracy   95 % interval")
    for step, results in curve.items():
        low, high = results["interval"]
        a, o, z = (round(50 * (x - left) / width) for x in (low, results["accuracy"], high))
        bar = " " * a + "-" * (o - a) + "o" + "-" * (z - o) + " <- best" * (step == best)
        say(f"{step:>6} {results['accuracy']:8.1%}   {100 * low:5.1f} to {100 * high:5.1f}  {bar}")
    say("the best is chosen on the questions that score it, so it is optimistic: report the whole curve")


def ask(config: Config) -> None:
    """One question about one's own clip, answered on the terminal."""
    row = {"audio": config.ask, "question": config.question, "choices": config.choices}
    with blame("--ask"):
        example = replace(to_example(row, "--ask", ""), audio=config.ask)
        load_audio(example.audio)  # before the model is loaded
    prompt = prompt_style(config, config.model)
    model, processor = load_model(config.model)
    model.to(Accelerator().device).eval()
    asked = prepare(processor, [example], prompt, config.silence)
    (prediction,) = predict(model, processor, asked, config.max_new_tokens, config.decoding)
    if prediction.error:
        raise BadInput(prediction.error)
    say(prediction.completion)
    if prediction.cut:
        say(f"(only the first {window(processor) / SAMPLE_RATE:.0f} s were used)")


def main() -> None:
    config = parse(Config, __doc__)
    modes = [mode for mode in ("checkpoints", "score", "compare", "ask") if getattr(config, mode)]
    if len(modes) > 1:
        raise BadInput(f"--{modes[0]} and --{modes[1]} are two things to do: choose one")
    if config.decoding not in ("greedy", "model"):
        raise BadInput(f"--decoding {config.decoding}: unknown, choose greedy or model")
    check_at_least(config, max_new_tokens=1)
    if config.score:
        score_file(config.score)
    elif config.compare:
        compare(config.compare)
    elif config.ask:
        ask(config)
    else:
        if not config.data:
            raise BadInput("--data is missing: the file of questions")
        check_at_least(config, batch_size=1, limit=0, seed=0)
        examples, digest = load_examples(config.data, config.audio_dir, for_training=False)
        examples = examples[: config.limit or None]
        check_audio(examples, skip=True)
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # processes end at different times
        output, accelerator = config.output or "runs/eval", Accelerator(kwargs_handlers=[patience])
        if accelerator.is_main_process:
            warn_of_a_gpu_not_found()
            warn_of_clips_by_name(examples)
        if config.checkpoints:
            evaluate_checkpoints(config, accelerator, examples, digest)
        elif os.path.exists(target := os.path.join(output, "predictions.json")) and not answer_files(output):
            raise BadInput(f"{target}: already there; remove it or name another --output")
        else:
            accelerator.wait_for_everyone()  # until all have seen that
            evaluate(config, accelerator, examples, digest, config.model, output)
        accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
