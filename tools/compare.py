"""The paper's question on the toy: train each method on one task only, and measure it on all three.

    python -m tools.compare                  # 45 runs: five methods, three learning rates, three seeds
    python -m tools.compare --task music     # train on another task
    python -m tools.compare --quick          # one seed and half the steps

Runs go in parallel, one per core, at most eight. An interrupted command continues where it stopped: results
in runs/toy/compare are reused, so remove that folder after you change the code.
"""

import argparse
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from cli import BadInput, run_main
from data import read_rows, write_rows
from model import has_model
from toy import FOLDER, N_TEST, make_data, make_missing, run_script

TASKS = ["sound", "music", "speech"]
SEEDS = [1, 2, 3]
SKILLED = 95  # % on the trained task
STUDENT_T = 4.303  # 97.5 % quantile for two degrees of freedom, that is, three seeds


@dataclass
class Method:
    script: str
    flags: str
    rates: tuple[str, ...]  # learning rates, ascending


RATES = ("5e-5", "1e-4", "2e-4")
LORA_RATES = ("3e-4", "1e-3", "3e-3")
LORA = "--lora_rank 16 --train encoder language"
METHODS = {
    "full SFT": Method("train_sft.py", "", RATES),
    "LoRA SFT": Method("train_sft.py", LORA, LORA_RATES),
    "GRPO": Method("train_grpo.py", "--beta 0.04", RATES),
    "GRPO, beta 0.2": Method("train_grpo.py", "--beta 0.2", RATES),
    "GRPO, LoRA": Method("train_grpo.py", f"--beta 0.04 {LORA}", LORA_RATES),
}
PAIRS = [("GRPO", "full SFT"), ("GRPO, beta 0.2", "full SFT"), ("GRPO, LoRA", "LoRA SFT")]

# ---------------------------------------------------------------- the runs


@dataclass
class Comparison:
    """Where the runs of one command are stored, and the settings they share."""

    tasks: list[str]  # the trained one first
    folder: str
    seeds: list[int]
    steps: int
    parallel: int  # runs at a time


def compare(task: str = "sound", quick: bool = False) -> None:
    """Train each method on one task and measure it on all; print two tables and draw a plot."""
    make_missing("base")
    tasks = sorted(TASKS, key=lambda name: name != task)
    parallel = min(8, os.cpu_count())
    folder = f"{FOLDER}/compare/{task}"
    if quick:
        settings = Comparison(tasks, f"{folder}-quick", SEEDS[:1], steps=150, parallel=parallel)
    else:
        settings = Comparison(tasks, folder, SEEDS, steps=300, parallel=parallel)
    os.makedirs(settings.folder, exist_ok=True)

    make_data(f"{FOLDER}/compare", "test", 3 * N_TEST, seed=3)
    rows = [row for row, _ in read_rows(f"{FOLDER}/train.jsonl")[0]]
    write_rows(f"{FOLDER}/train-{task}.jsonl", [row for row in rows if row["task"] == task])

    scores = run_all(settings)
    base = np.array(measure(settings, f"{FOLDER}/base", f"{settings.folder}/base"))
    print("\n".join([*accuracy_table(tasks, base, scores), "", *difference_table(tasks, scores)]))
    picture = f"{settings.folder}/compare.svg"
    draw(tasks, base, scores).savefig(picture)
    print(f"\nplot saved to {picture}")


def run_all(settings: Comparison) -> np.ndarray:
    """Train and measure all methods, learning rates and seeds; returns scores (seeds, methods, rates, 4)."""
    with ThreadPoolExecutor(settings.parallel) as pool:
        runs = []
        for seed in settings.seeds:
            for name, method in METHODS.items():
                for rate in method.rates:
                    runs.append(pool.submit(train_and_measure, settings, name, rate, seed))
        try:
            for run in tqdm(as_completed(runs), total=len(runs), unit="run"):
                run.result()
        except KeyboardInterrupt:  # the scripts have received it too: they save and stop
            raise BadInput("interrupted; run the same command again to continue") from None
        finally:
            pool.shutdown(cancel_futures=True)
    scores = [run.result() for run in runs]
    return np.reshape(scores, (len(settings.seeds), len(METHODS), len(RATES), 4))


def train_and_measure(settings: Comparison, name: str, rate: str, seed: int) -> list[float]:
    """Train a run, unless that is done already, and return its scores; see `measure`."""
    method = METHODS[name]
    output = f"{settings.folder}/{name.replace(',', '').replace(' ', '-')}-{rate}-{seed}"
    if not has_model(output):
        flags = f"--model {FOLDER}/base --data {FOLDER}/train-{settings.tasks[0]}.jsonl --output {output}"
        flags += f" {method.flags} --lr {rate} --seed {seed} --micro_batch 16 --max_new_tokens 16"
        flags += f" --max_steps {settings.steps} --save_every {settings.steps} --resume"
        run_script(method.script, flags, f"{output}.log", settings.parallel)
    return measure(settings, output, f"{output}/eval")


def measure(settings: Comparison, model: str, output: str) -> list[float]:
    """Accuracy in % on each task, the trained one first, and the mean of the other two: four numbers."""
    results = f"{output}/results.json"
    if not os.path.exists(results):
        shutil.rmtree(output, ignore_errors=True)  # an interrupted evaluation, which cannot be continued
        flags = f"--model {model} --data {FOLDER}/compare/test.jsonl --max_new_tokens 16 --output {output}"
        run_script("evaluate.py", flags, f"{output}.log", settings.parallel)
    with open(results) as file:
        by_task = json.load(file)["by"]["task"]
    accuracies = [100 * by_task[task]["accuracy"] for task in settings.tasks]
    return [*accuracies, np.mean(accuracies[1:])]


# ---------------------------------------------------------------- tables and picture


def accuracy_table(tasks: list[str], base: np.ndarray, scores: np.ndarray) -> list[str]:
    """Markdown lines: accuracy of each method and learning rate, mean and range over the seeds.

    base: (4,); scores: (seeds, methods, learning rates, 4).
    """
    lines = [f"| accuracy in % | lr | {tasks[0]} (trained) | {tasks[1]} | {tasks[2]} | the other two |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    cells = [f"{value:.1f}" for value in base]
    lines.append(f"| base | | {' | '.join(cells)} |")
    for m, (name, method) in enumerate(METHODS.items()):
        for r, rate in enumerate(method.rates):
            cells = []
            for values in scores[:, m, r].T:  # (seeds,), for each task
                cell = f"{values.mean():.1f}"
                if len(values) > 1:
                    cell += f" ({values.min():.1f} to {values.max():.1f})"
                cells.append(cell)
            lines.append(f"| {name} | {rate} | {' | '.join(cells)} |")
    return lines


def difference_table(tasks: list[str], scores: np.ndarray) -> list[str]:
    """Markdown lines: GRPO minus SFT at equal skill, mean and 95 % t-interval, paired by seed."""
    names = f"{tasks[0]} (trained) | {tasks[1]} | {tasks[2]} | the other two"
    lines = [f"| difference in points at {SKILLED} % on {tasks[0]} | {names} |"]
    lines.append("| --- | --- | --- | --- | --- |")
    chosen = choose_at_equal_skill(scores)
    indices = list(METHODS)
    for grpo, sft in PAIRS:
        grpo_scores = chosen[:, indices.index(grpo)]  # (seeds, 4)
        sft_scores = chosen[:, indices.index(sft)]
        cells = []
        for values in (grpo_scores - sft_scores).T:  # (seeds,), for each task
            mean = values.mean()
            cell = f"{mean:+.1f}"
            if len(values) == len(SEEDS):  # STUDENT_T assumes this many seeds
                half = STUDENT_T * values.std(ddof=1) / len(values) ** 0.5
                cell += f" ({mean - half:+.1f} to {mean + half:+.1f})"
            cells.append(cell)
        lowest_skill = min(grpo_scores[:, 0].min(), sft_scores[:, 0].min())
        note = "" if lowest_skill >= SKILLED else f", not all at {SKILLED} %"
        lines.append(f"| {grpo} minus {sft}{note} | {' | '.join(cells)} |")
    return lines


def choose_at_equal_skill(scores: np.ndarray) -> np.ndarray:
    """For each seed and method the scores at one learning rate: (seeds, methods, 4).

    It is the lowest rate that reaches SKILLED % on the trained task, or the best one on that task if none
    does. The other tasks, which the comparison is about, play no part. scores: (seeds, methods, rates, 4).
    """
    seeds, methods, _, values = scores.shape
    chosen = np.empty((seeds, methods, values))
    for s in range(seeds):
        for m in range(methods):
            skill = scores[s, m, :, 0]
            skilled = np.flatnonzero(skill >= SKILLED)
            rate = skilled[0] if len(skilled) else skill.argmax()
            chosen[s, m] = scores[s, m, rate]
    return chosen


def draw(tasks: list[str], base: np.ndarray, scores: np.ndarray) -> Figure:
    """A point per run, and a line per method through the means of its learning rates."""
    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    axes.plot(base[0], base[3], "k*", markersize=12, label="base")
    for m, name in enumerate(METHODS):
        trained = scores[:, m, :, 0]  # (seeds, learning rates)
        others = scores[:, m, :, 3]
        axes.plot(trained.flatten(), others.flatten(), "o", color=f"C{m}", alpha=0.5)
        axes.plot(trained.mean(0), others.mean(0), color=f"C{m}", label=name)
    axes.set(xlabel=f"accuracy on {tasks[0]}, the trained task, %", ylabel="mean of the two others, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    return figure


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--task", choices=TASKS, default="sound", help="the task to train on")
    parser.add_argument("--quick", action="store_true", help="one seed and half the steps")
    flags = parser.parse_args()
    compare(flags.task, flags.quick)


if __name__ == "__main__":
    run_main(main)
