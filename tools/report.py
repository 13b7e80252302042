"""Turn a training run or an evaluation into one HTML page to read and listen to.

    python -m tools.report runs/grpo                         # a run: curves, and some prompts over the steps
    python -m tools.report runs/eval                         # an evaluation: accuracy, questions, answers
    python -m tools.report runs/before runs/after            # two evaluations: the answers that changed
    python -m tools.report runs/grpo --picture curves.svg    # also draw accuracy and KL as a picture

The page is `report.html` in the folder; for two evaluations it is `changed.html` in the second folder. It
needs no network and works while a run is still going. Short clips are embedded, long ones are linked.
"""

import argparse
import base64
import hashlib
import html
import io
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

from matplotlib import rc_context
from matplotlib.figure import Figure

from checkpoints import read_log
from cli import BadInput, located, printable, run_main, say
from data import Example, open_audio, read_rows, to_example, write_atomically
from evaluate import read_json, read_marks
from model import MODEL_FILES
from rewards import GROUPS, judge, paired_difference, prediction_of

MAX_ITEMS = 2_000  # groups or questions on a page
MAX_CLIP_BYTES = 1_000_000  # a larger clip is linked instead of embedded
MAX_EMBEDDED_BYTES = 10_000_000  # for all the clips of a page together
MARKS = {True: "right", False: "wrong", None: "not scored"}

STYLE = """
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: auto; padding: 1rem }
svg { width: 100%; height: auto }
figure { margin: 0 }
audio { width: min(24rem, 100%); display: block }
article { border-top: 1px solid GrayText; padding: .5rem 0 1rem }
td, th { padding: .2rem .6rem; text-align: left; vertical-align: top }
.completion, td, h1, h3, li, [scope=row] { white-space: pre-wrap; overflow-wrap: anywhere }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
form { position: sticky; top: 0; padding: .5rem 0; background: Canvas }
form { display: flex; flex-wrap: wrap; gap: .5rem 1rem }
input[type=range] { width: min(30rem, 60vw); vertical-align: middle }
[hidden] { display: none !important }
"""

SCRIPT = """
// Each prompt of a run has a slider, which selects the step to show.
for (const slider of document.querySelectorAll("input[type=range]")) {
  const groups = [...slider.closest("article").querySelectorAll("section")];

  slider.oninput = () => {
    groups.forEach((group, i) => group.hidden = i != slider.value);
    const step = groups[slider.value].dataset.step;
    slider.nextElementSibling.value = step;
    slider.ariaValueText = step;
  };
  slider.closest("p").hidden = false;
  slider.oninput();
}

// An evaluation has a form, which filters the questions.
for (const form of document.forms) {
  const items = [...document.querySelectorAll("article")];
  const texts = items.map(item => item.textContent.toLowerCase());

  form.oninput = () => {
    const text = form.elements.text.value.toLowerCase();
    const chosen = [...form.querySelectorAll("select")].filter(select => select.value);
    let shown = 0;
    items.forEach((item, i) => {
      const fits = chosen.every(select => item.getAttribute("data-" + select.name) == select.value);
      item.hidden = !(fits && texts[i].includes(text));
      shown += !item.hidden;
    });
    form.elements.count.value = `${shown} of ${items.length} shown`;
  };
  form.onsubmit = event => event.preventDefault();
  form.hidden = false;
  form.oninput();
}
"""

# ---------------------------------------------------------------- parts of a page


def escape(value: object) -> str:
    """Make anything plain text inside an element or a quoted attribute."""
    return html.escape(printable(str(value)))


def page(title: str, content: str) -> str:
    """A complete HTML document. It loads nothing but clips and runs no script but SCRIPT."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    policy += "; media-src data: file: 'self'; base-uri 'none'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{content}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def table(rows: list[tuple]) -> str:
    """A table in which each row begins with its name."""
    lines = []
    for name, *values in rows:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>\n')
    return f"<table>{''.join(lines)}</table>"


def question_html(question: str, choices: list, answer: str | None) -> str:
    """A question as a heading, and its options as a list."""
    parts = [f"<h3>{escape(question)}</h3><ul>"]
    for choice in choices:
        mark = " (correct)" if choice == answer else ""
        parts.append(f"<li>{escape(choice)}{mark}</li>")
    parts.append("</ul>\n")
    return "".join(parts)


class Clips:
    """Audio players of one page in `folder`: embeds short clips until the page is large, links the others."""

    def __init__(self, folder: str):
        self.folder = folder
        self.bytes_left = MAX_EMBEDDED_BYTES

    def player(self, path: str) -> str:
        """A player for the clip, or the reason why it cannot be played."""
        try:
            with open_audio(path) as file:
                seconds = file.seconds()
                kind = file.format
        except BadInput as error:
            return f"<p>{escape(error)}</p>"

        size = os.path.getsize(path)
        if size <= min(MAX_CLIP_BYTES, self.bytes_left):
            self.bytes_left -= size
            media_type = {"FLAC": "flac", "MP3": "mpeg", "OGG": "ogg"}.get(kind, "wav")
            content = base64.b64encode(Path(path).read_bytes()).decode()
            source = f"data:audio/{media_type};base64,{content}"
            preload = "metadata"
        else:
            source = quote(os.path.relpath(path, self.folder))
            preload = "none"
        label = f"clip of {seconds:.1f} s" if seconds else "clip"
        return f'<audio controls preload="{preload}" src="{source}" aria-label="{label}"></audio>{label}\n'


# ---------------------------------------------------------------- curves

# {title of a panel: {label of a curve: key in metrics.jsonl}}; find_panels adds what depends on the run
PANELS = {
    "accuracy": {"held-out questions, greedy": "eval_accuracy", "samples": "reward_accuracy"},
    "KL to the reference": {"samples": "kl"},
    "reward": {"sum of all parts": "reward"},
    "completion length (tokens)": {"mean": "completion_tokens"},
    "share of groups with equal rewards": {"mean": "zero_std_groups"},
    "share of clipped tokens": {"mean": "clip_fraction"},
    "loss": {"mean": "loss"},
    "seconds per step": {},
}
LIMITS = {"accuracy": (0, 1), "KL to the reference": (0, None)}  # of the vertical axis
COLOURS = ["#2a7de1", "#d9541e", "#2e9e5b", "#a259d9", "#8a8a2a", "#c03a6b", "#777777"]
LINE_STYLES = ["-", "--", ":"]


def find_panels(lines: list[dict]) -> dict[str, dict[str, list]]:
    """The curves of a run, {panel: {label: [(step, value), ...]}}, without empty curves and panels."""
    keys = {}  # in the order of the log
    for line in lines:
        keys |= line

    wanted = {title: dict(curves) for title, curves in PANELS.items()}
    for key in keys:
        # reward_accuracy has its panel, and reward_std is not a part of the reward
        if key.startswith("reward_") and key not in ("reward_accuracy", "reward_std"):
            wanted["reward"][key.removeprefix("reward_")] = key
        if key.startswith("seconds_"):
            wanted["seconds per step"][key.removeprefix("seconds_")] = key

    panels = {}
    for title, curves in wanted.items():
        for label, key in curves.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                panels.setdefault(title, {})[label] = smooth(points)
    return panels


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Average neighbouring points if there are 80 or more, which leaves about 40."""
    size = max(1, len(points) // 40)
    smoothed = []
    for first in range(0, len(points), size):
        neighbours = points[first : first + size]
        last_step = neighbours[-1][0]
        smoothed.append((last_step, fmean(value for _, value in neighbours)))
    return smoothed


def plot(axes, title: str, curves: dict[str, list]) -> None:
    """Draw one panel. Curves differ in line style too, so that colour is not needed to tell them apart."""
    for number, (label, points) in enumerate(curves.items()):
        steps = [step for step, _ in points]
        values = [value for _, value in points]
        axes.plot(
            steps,
            values,
            label=label,
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINE_STYLES[number % len(LINE_STYLES)],
            marker="." if len(points) < 20 else None,
        )
    axes.set(title=title, xlabel="step", ylim=LIMITS.get(title))
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(frameon=False)


def panel_svg(title: str, curves: dict[str, list]) -> str:
    """A panel as SVG inside the page. It has the page's text colour, and its end points as a description."""
    # matplotlib does not know currentColor, so an unused colour stands in for it
    ink = "#010203"
    settings = {"svg.fonttype": "none", "svg.hashsalt": title}
    for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        settings[name] = ink
    file = io.StringIO()
    with rc_context(settings):
        figure = Figure(figsize=(4.6, 3), layout="tight")
        plot(figure.subplots(), title, curves)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue().replace(ink, "currentColor")
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # ids that every panel uses: a page must not repeat them
    _, _, svg = svg.partition("<svg")  # drop the XML declaration

    ends = []
    for label, points in curves.items():
        first_value = points[0][1]
        last_value = points[-1][1]
        ends.append(f"{label} from {first_value:.4g} to {last_value:.4g}")
    description = escape(f"{title}: {', '.join(ends)}")
    return f'<figure><svg role="img" aria-label="{description}"{svg}</figure>\n'


def draw_picture(lines: list[dict], path: str) -> Figure:
    """Draw accuracy and KL side by side, as a picture file of any format that matplotlib writes."""
    panels = find_panels(lines)
    figure = Figure(figsize=(9, 3.2), layout="tight")
    for axes, title in zip(figure.subplots(1, 2), ("accuracy", "KL to the reference")):
        plot(axes, title, panels.get(title, {}))
    with rc_context({"svg.hashsalt": "picture"}):
        figure.savefig(path, metadata={"Date": None})
    return figure


# ---------------------------------------------------------------- a training run


def run_page(folder: str, lines: list[dict], samples: list[dict]) -> str:
    """The page of a run, from the lines of its metrics.jsonl and samples.jsonl."""
    settings = read_settings(folder)
    steps = str(sum("loss" in line for line in lines))
    if settings.get("max_steps"):  # SFT has 0 if --epochs decides
        steps += f" of {settings['max_steps']}"
    is_finished = any(os.path.exists(os.path.join(folder, name)) for name in MODEL_FILES)
    state = "finished" if is_finished else "not finished"
    parts = [f"<p>Steps: {escape(steps)} ({state}).</p>\n"]

    parts.append('<h2>Curves</h2>\n<div class="curves">')
    panels = find_panels(lines)
    for title, curves in panels.items():
        parts.append(panel_svg(title, curves))
    if not panels:
        parts.append("No metrics yet.")
    parts.append("</div>\n")

    if samples:
        parts.append(groups_html(folder, samples))

    parts.append("<h2>Settings</h2>\n")
    if settings:
        parts.append(table(list(settings.items())))
    else:
        parts.append("<p>They are written with the first checkpoint.</p>")
    return page(folder, "".join(parts))


def read_settings(folder: str) -> dict:
    """Settings of a run, from what it saved last; empty before the first checkpoint."""
    paths = [*Path(folder).glob("checkpoint-*[0-9]/run.json"), *Path(folder).glob("run.json")]
    if not paths:
        return {}
    return read_json(max(paths, key=os.path.getmtime))


def groups_html(folder: str, samples: list[dict]) -> str:
    """The groups of each prompt, with a slider over the steps. A long run shows only every n-th step."""
    steps = sorted({row["step"] for row in samples}, reverse=True)
    n = math.ceil(len(samples) / MAX_ITEMS)
    shown_steps = set(steps[::n])  # includes the last step
    about = (
        "The prompts and the random numbers are the same at every step, so only the policy changes. "
        "The advantage compares a completion with its group: above 0, training makes it more likely. "
        f"The page shows {len(shown_steps)} of {len(steps)} steps."
    )
    parts = [f"<h2>Groups</h2>\n<p>{about}</p>\n"]

    prompts = {}
    for row in samples:
        if row["step"] in shown_steps:
            prompt = (row["audio"], row["question"], *row["choices"])
            prompts.setdefault(prompt, []).append(row)

    clips = Clips(folder)
    for rows in prompts.values():
        first = rows[0]
        parts.append("<article>")
        parts.append(question_html(first["question"], first["choices"], first["answer"]))
        parts.append(clips.player(first["audio"]))
        # hidden without JavaScript, where all groups are visible
        slider = f'<input type="range" max="{len(rows) - 1}" value="0"> <output></output>'
        parts.append(f"<p hidden><label>step {slider}</label></p>\n")
        for row in rows:
            parts.append(group_html(row))
        parts.append("</article>\n")
    return "".join(parts)


def group_html(row: dict) -> str:
    """One group as a table: blue completions become more likely, orange ones less."""
    heading = f"step {row['step']}, mean reward {fmean(row['rewards']):.2f}"
    parts = [f'<section data-step="{escape(row["step"])}"><h4>{escape(heading)}</h4>\n<table><tr>']
    for name in ("reward", "advantage", "completion"):
        parts.append(f'<th scope="col">{name}</th>')
    parts.append("</tr>\n")
    for completion, reward, A in zip(row["completions"], row["rewards"], row["advantages"], strict=True):
        colour = "30 120 230" if A > 0 else "230 110 20"
        opacity = min(abs(A), 2) / 5
        cells = f"<td>{reward:g}</td><td>{A:+.2f}</td><td>{escape(completion)}</td>"
        parts.append(f'<tr style="background: rgb({colour} / {opacity:.2f})">{cells}</tr>\n')
    parts.append("</table></section>\n")
    return "".join(parts)


# ---------------------------------------------------------------- evaluations


@dataclass
class Item:
    """A question on the page of an evaluation."""

    example: Example
    result: str  # right, wrong or not scored; for two evaluations, how the answer changed
    answers: list[tuple[str, dict]]  # label, and row of predictions.json


def evaluation_page(folder: str, audio_dir: str) -> str:
    """The page of one evaluation: accuracy, and every question with its answer."""
    path = os.path.join(folder, "predictions.json")
    rows, digest = read_rows(path)
    results = read_json(os.path.join(folder, "results.json"))
    if results.get("predictions_sha256") != digest:
        raise BadInput(f"no results.json for these predictions; run python evaluate.py --score {path}")

    audio_dir = audio_dir or recorded_audio_dir(results)
    items = []
    for row, location in rows:
        mark = MARKS[judge(row, location)]
        items.append(Item(example_of(row, location, audio_dir), mark, [(mark, row)]))

    content = accuracy_html(accuracy_rows(results)) + items_html(items, folder)
    facts = [(name, value) for name, value in results.items() if is_fact(value)]
    return page(folder, f"{content}<h2>Settings</h2>\n{table(facts)}")


def changes_page(first_folder: str, second_folder: str, audio_dir: str) -> str:
    """The page of two evaluations: both accuracies, and the questions with different answers."""
    first_path = os.path.join(first_folder, "predictions.json")
    first = read_marks(first_path)
    second = read_marks(os.path.join(second_folder, "predictions.json"))
    if first.keys() != second.keys():
        raise BadInput(f"does not have the same questions as {first_folder}")
    first_results = read_json(os.path.join(first_folder, "results.json"))
    second_results = read_json(os.path.join(second_folder, "results.json"))
    audio_dir = audio_dir or recorded_audio_dir(second_results)

    items = []
    pairs = []  # right before, right after
    for key, (row, before) in first.items():
        new_row, after = second[key]
        if before is not None:
            pairs.append((before, after))
        if before != after:
            result = f"now {MARKS[after]}"
        elif prediction_of(row) != prediction_of(new_row):
            result = "different answer"
        else:
            continue
        answers = [(f"first ({MARKS[before]})", row), (f"second ({MARKS[after]})", new_row)]
        items.append(Item(example_of(row, first_path, audio_dir), result, answers))

    rows = []
    if pairs:
        rows.append((first_folder, f"{fmean(before for before, _ in pairs):.1%}"))
        rows.append((second_folder, f"{fmean(after for _, after in pairs):.1%}"))
        d, low, high, p = paired_difference(pairs)
        rows.append(("difference", f"{d:+.1%} ({low:+.1%} to {high:+.1%}), McNemar p {p:.2g}"))
    changed = f"<p>{len(items)} of {len(first)} answers changed.</p>\n"
    content = accuracy_html(rows) + changed + items_html(items, second_folder)

    facts = []
    for name, value in second_results.items():
        if is_fact(value):
            facts.append((name, first_results.get(name, ""), value))
    title = f"{first_folder} and {second_folder}"
    return page(title, f"{content}<h2>Settings</h2>\n{table(facts)}")


def recorded_audio_dir(results: dict) -> str:
    """The folder in which an evaluation looked up its clips."""
    return results.get("audio_dir") or os.path.dirname(results.get("data", ""))


def is_fact(value: object) -> bool:
    """Whether a value of results.json fits into a cell of the settings."""
    return isinstance(value, (str, int, float))


def example_of(row: dict, location: str, audio_dir: str) -> Example:
    """A row of predictions as an example; if it is unusable, what can be shown of it and the reason."""
    try:
        with located(location):
            return to_example(row, location, audio_dir)
    except BadInput as error:
        choices = row.get("choices")
        if not isinstance(choices, list):
            choices = []
        return Example("", row.get("question", ""), choices, row.get("answer"), row, location, str(error))


def accuracy_rows(results: dict) -> list[tuple[str, str, str, str]]:
    """Accuracy of an evaluation, overall and by group, each with its interval and counts."""
    if not results["total"]:
        return []
    scores = {"overall": results}
    for key, groups in results["by"].items():
        for name, part in groups.items():
            scores[f"{key} {name}"] = part

    rows = []
    for name, part in scores.items():
        low, high = part["interval"]
        counts = f"{part['correct']} of {part['total']}"
        rows.append((name, f"{part['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", counts))
    return rows


def accuracy_html(rows: list[tuple]) -> str:
    """The accuracies of an evaluation, or of two."""
    if not rows:
        return "<h2>Accuracy</h2>\n<p>The questions have no answers to compare with.</p>\n"
    return f"<h2>Accuracy</h2>\n<p>Intervals are 95% confidence intervals.</p>\n{table(rows)}\n"


def items_html(items: list[Item], folder: str) -> str:
    """Questions with their answers, and a form that filters them."""
    is_good = ("right", "different answer")
    kept = items
    if len(items) > MAX_ITEMS:  # mistakes are what a reader looks for
        order = sorted(range(len(items)), key=lambda i: items[i].result in is_good)
        kept = [items[i] for i in sorted(order[:MAX_ITEMS])]
    count = f"The page shows {len(kept)} of {len(items)} questions."
    if len(kept) < len(items):
        count += " Right answers are left out first."
    parts = [f"<h2>Questions</h2>\n<p>{count}</p>\n", filter_html(kept)]

    clips = Clips(folder)
    for item in kept:
        attributes = [f'data-{name}="{escape(value)}"' for name, value in properties(item).items()]
        example = item.example
        parts.append(f"<article {' '.join(attributes)}>")
        parts.append(question_html(example.question, example.choices, example.answer))
        if example.problem:
            parts.append(f"<p>{escape(example.problem)}</p>\n")
        else:
            parts.append(clips.player(example.audio))
        for label, row in item.answers:
            answer = row.get("completion") or prediction_of(row) or "(no answer)"
            parts.append(f'<p>{label}: <span class="completion">{escape(answer)}</span></p>\n')
        parts.append("</article>\n")
    return "".join(parts)


def filter_html(items: list[Item]) -> str:
    """The form that filters questions by their properties and by text; SCRIPT makes it visible."""
    parts = ['<form hidden aria-label="filter">']
    for name in ("result", *GROUPS):
        values = {properties(item)[name] for item in items if name in properties(item)}
        if values:
            options = "".join(f"<option>{escape(value)}</option>" for value in sorted(values))
            select = f'<select name="{name}"><option value="">all</option>{options}</select>'
            parts.append(f"<label>{name} {select}</label>")
    parts.append('<label>text <input type="search" name="text"></label> <output name="count"></output>')
    parts.append("</form>\n")
    return "".join(parts)


def properties(item: Item) -> dict[str, str]:
    """What the form can filter a question by."""
    row = item.example.row
    groups = {key: str(row[key]) for key in GROUPS if key in row}
    return {"result": item.result, **groups}


# ---------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", help="a training run, an evaluation, or two evaluations")
    parser.add_argument("--audio_dir", default="", help="folder of an evaluation's clips, if they have moved")
    parser.add_argument("--picture", default="", help="file for a picture of a run's accuracy and KL")
    flags = parser.parse_args()

    folder = flags.folders[-1]
    lines = read_log(os.path.join(folder, "metrics.jsonl"))
    samples = read_log(os.path.join(folder, "samples.jsonl"))
    is_run = bool(lines or samples)
    is_evaluation = os.path.exists(os.path.join(folder, "predictions.json"))

    name = "report.html"
    with located(folder):
        if len(flags.folders) == 1 and is_run:
            content = run_page(folder, lines, samples)
        elif len(flags.folders) == 1 and is_evaluation:
            content = evaluation_page(folder, flags.audio_dir)
        elif len(flags.folders) == 2 and is_evaluation:
            content = changes_page(*flags.folders, flags.audio_dir)
            name = "changed.html"
        else:
            raise BadInput("neither a run (metrics.jsonl) nor one or two evaluations (predictions.json)")
    if flags.picture:
        with located(f"--picture {flags.picture}"):
            if not lines:
                raise BadInput(f"{folder} has no metrics.jsonl to draw")
            draw_picture(lines, flags.picture)

    target = os.path.join(folder, name)
    write_atomically(target, content)
    say(f"the page is {target}")


if __name__ == "__main__":
    run_main(main)
