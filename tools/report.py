"""Turn training runs or evaluations into one HTML page to read and listen to.

    python -m tools.report runs/grpo                         # a run: curves, and answers to a few prompts
    python -m tools.report runs/a runs/b runs/c              # several runs: curves, settings, code compared
    python -m tools.report runs/eval                         # an evaluation: accuracy, questions, answers
    python -m tools.report runs/before runs/after            # two evaluations: the answers that changed
    python -m tools.report runs/grpo --picture curves.svg    # also save a plot of accuracy and KL

One folder gets a `report.html`. Several runs get a `compared.html` in the last folder, and two evaluations
get a `changed.html` in the second. The page works offline, and a run may still be going. Short clips are
embedded, long ones are linked.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from checkpoints import read_log
from cli import BadInput, located, printable, run_main, say
from data import Example, open_audio, read_rows, to_example, write_atomically
from evaluate import read_json, read_marks
from model import has_model
from rewards import GROUPS, judge, paired_difference, prediction_of

MAX_ITEMS = 2_000  # groups or questions on a page
MAX_CLIP_BYTES = 1_000_000  # a larger clip is linked instead of embedded
MAX_EMBEDDED_BYTES = 10_000_000  # for all clips on a page together
MAX_PATCH_LINES = 200
MARKS = {True: "right", False: "wrong", None: "not scored"}

STYLE = """
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: auto; padding: 1rem }
svg { width: 100%; height: auto }
figure { margin: 0 }
figcaption { font-size: .9rem }
audio { width: min(24rem, 100%); display: block }
article { border-top: 1px solid GrayText; padding: .5rem 0 1rem }
td, th { padding: .2rem .6rem; text-align: left; vertical-align: top }
.completion, td, th, h1, h3, li, p { overflow-wrap: anywhere }
.completion, td, h1, h3, li, [scope=row] { white-space: pre-wrap }
.scroll, pre { overflow-x: auto }
.scroll td { min-width: 7rem }
.scroll [scope=row], section [scope=col] { overflow-wrap: normal }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
form, .slider { position: sticky; top: 0; margin: 0; padding: .5rem 0; background: Canvas }
form { display: flex; flex-wrap: wrap; gap: .5rem 1rem }
input[type=range] { width: min(30rem, 60vw); vertical-align: middle }
[hidden] { display: none !important }
"""

SCRIPT = """
// A run has one slider, which selects the step whose groups are shown.
for (const slider of document.querySelectorAll("input[type=range]")) {
  const steps = slider.dataset.steps.split(" ");
  const groups = document.querySelectorAll("section");

  slider.oninput = () => {
    const step = steps[slider.value];
    groups.forEach(group => group.hidden = group.dataset.step != step);
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
    """Escape a value, so that it is plain text in an element or a quoted attribute."""
    return html.escape(printable(str(value)))


def page(title: str, content: str) -> str:
    """A complete HTML document. It loads only clips and runs only SCRIPT."""
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


def table(rows: list[tuple], columns: list[str] | None = None) -> str:
    """A table in which each row begins with its name; `columns` are the headings of the other cells."""
    lines = []
    if columns:
        headings = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
        lines.append(f"<tr><td></td>{headings}</tr>\n")
    for name, *values in rows:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>\n')
    return f"<table>{''.join(lines)}</table>"


def link(path: str, text: str, page_folder: str) -> str:
    """A link from a page in `page_folder` to a file."""
    target = quote(os.path.relpath(path, page_folder))
    return f'<a href="{target}">{escape(text)}</a>'


def question_html(question: str, choices: list, answer: str | None) -> str:
    """A question as a heading, and its options as a list."""
    parts = [f"<h3>{escape(question)}</h3><ul>"]
    for choice in choices:
        mark = " (correct)" if choice == answer else ""
        parts.append(f"<li>{escape(choice)}{mark}</li>")
    parts.append("</ul>\n")
    return "".join(parts)


class Clips:
    """Audio players for one page in `folder`: embeds short clips until the page is large, links the rest."""

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
        label = f"clip, {seconds:.1f} s" if seconds else "clip"
        return f'<audio controls preload="{preload}" src="{source}" aria-label="{label}"></audio>{label}\n'


# ---------------------------------------------------------------- what a run's folder contains


@dataclass
class Run:
    folder: str
    lines: list[dict]  # from metrics.jsonl
    settings: dict  # run.json; empty if there is none
    code: list["Code"]  # code.json; empty if there is none


@dataclass
class Code:
    """An entry of code.json: the first describes the code at the start of a run, the others later changes."""

    step: int  # the first step with this code
    commit: str  # empty without git
    patch: str  # name of the file with the changes since the commit; empty if there are none
    patch_text: str
    versions: dict[str, str]  # by package


def read_run(folder: str) -> Run:
    """Read everything about a run except its groups."""
    with located(folder):
        lines = read_log(os.path.join(folder, "metrics.jsonl"))
        settings = read_json(os.path.join(folder, "run.json"))
        return Run(folder, lines, settings, read_code(folder))


def read_runs(folders: list[str]) -> dict[str, Run]:
    """Runs by their names on the page: their paths, without the leading folders that they all share."""
    paths = [os.path.abspath(folder) for folder in folders]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    runs = {}
    for folder, path in zip(folders, paths):
        name = os.path.relpath(path, shared)
        if name in runs:
            raise BadInput(f"{folder}: is given twice")
        runs[name] = read_run(folder)
    return runs


def read_code(folder: str) -> list[Code]:
    """The entries of code.json."""
    path = os.path.join(folder, "code.json")
    if not os.path.exists(path):
        return []
    codes = []
    with located("code.json"):
        for entry in json.loads(Path(path).read_text(encoding="utf-8")):
            patch = entry["patch"]
            text = ""
            if patch:
                text = Path(folder, patch).read_text(encoding="utf-8", errors="replace")
            codes.append(Code(entry["step"], entry["commit"], patch, text, dict(entry["versions"])))
    return codes


def progress(run: Run) -> str:
    """How far along a run is."""
    steps = str(sum("loss" in line for line in run.lines))
    if run.settings.get("max_steps"):  # 0 in SFT if --epochs sets the length
        steps += f" of {run.settings['max_steps']}"
    state = "finished" if has_model(run.folder) else "not finished"
    return f"{steps} steps ({state})"


# ---------------------------------------------------------------- curves

# {title of a panel: {label of a curve: key in metrics.jsonl}}; any other number gets a panel of its own
PANELS = {
    "accuracy": {
        "held-out questions, greedy": "eval_accuracy",
        "samples": "reward_accuracy",
        "held-out, with silence": "eval_accuracy_silent",
    },
    "KL to the reference": {"samples": "kl"},
    "reward": {"sum of all parts": "reward"},
    "completion length (tokens)": {
        "mean": "completion_tokens",
        "thinking": "thinking_tokens",
        "answer": "answer_tokens",
    },
    "share of truncated completions": {"mean": "truncated"},
    "share of groups with equal rewards": {"mean": "zero_std_groups"},
    "share of clipped tokens": {
        "ratio too low": "clip_fraction_low",
        "ratio too high": "clip_fraction_high",
        "either": "clip_fraction",  # what earlier versions logged
    },
    "loss": {"mean": "loss"},
    "gradient norm": {"before clipping": "grad_norm"},
    "share of clips": {"cut": "clips_cut", "silent": "clips_silent", "skipped": "clips_skipped"},
    "seconds per step": {"sample": "seconds_sample", "score": "seconds_score", "update": "seconds_update"},
}
NOT_DRAWN = ("step", "lr")
NOTES = {  # {title of a panel: what to look for}
    "accuracy": "The held-out curve is the one that counts: the samples answer training questions.",
    "KL to the reference": "It should rise from 0 and level off; if it keeps rising, the policy is drifting. "
    "With beta 0 it is not measured, and drawn as 0.",
    "reward": "If it rises and accuracy does not, the format improves, or the reward has a flaw.",
    "completion length (tokens)": "If it jumps to the limit, or falls to almost 0, read the completions.",
    "share of truncated completions": "It should be near 0: a truncated completion often has no answer.",
    "share of groups with equal rewards": "These groups teach nothing: all their advantages are 0.",
    "share of clipped tokens": "With one update per step it is 0; clipped tokens get no policy gradient.",
    "loss": (
        "In GRPO with one update per step, it is beta times the KL, so it says nothing about learning; "
        "in SFT it should fall."
    ),
    "gradient norm": "Norms above 1 are clipped to 1; a lasting rise is a sign of trouble.",
    "share of clips": "It should be near 0: the model does not hear what is cut, silent or skipped.",
    "seconds per step": "Sampling includes waiting for the audio, and takes longer with longer completions.",
    "entropy": "It falls as the policy gets more certain; near 0 it has collapsed: all samples are alike.",
    "reward_format": "It should rise first and stay near 1.",
    "reward_std": "The mean spread of rewards within a group: at 0, no group teaches anything.",
    "unique_completions": "Distinct texts in a group: at 1, all completions are the same and teach nothing.",
}
LIMITS = {  # of the y axis
    "accuracy": (0, 1),
    "KL to the reference": (0, None),
    "share of truncated completions": (0, None),
    "share of groups with equal rewards": (0, None),
    "share of clipped tokens": (0, None),
    "share of clips": (0, None),
}
COLOURS = ["#2a7de1", "#d9541e", "#2e9e5b", "#a259d9", "#8a8a2a", "#c03a6b", "#777777"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
LINE_STYLES = ["-", "--", ":", "-."]
PLAIN_TEXT = {"text.parse_math": False}  # a $ in a name does not start a formula


@dataclass
class Curve:
    run: str
    metric: str
    points: list[tuple[int, float]]  # step and value


def find_panels(runs: dict[str, Run]) -> dict[str, list[Curve]]:
    """The curves of each panel; empty panels are left out."""
    wanted = {title: dict(metrics) for title, metrics in PANELS.items()}
    known = {key for metrics in PANELS.values() for key in metrics.values()}
    for run in runs.values():
        for line in run.lines:
            for key in line:
                if key not in known and key not in NOT_DRAWN:
                    known.add(key)
                    wanted.setdefault(key, {})[key] = key

    panels = {}
    for title, metrics in wanted.items():
        for metric, key in metrics.items():
            for name, run in runs.items():
                points = read_points(run.lines, key)
                if points:
                    panels.setdefault(title, []).append(Curve(name, metric, smooth(points)))
    return panels


def read_points(lines: list[dict], key: str) -> list[tuple[int, float]]:
    """Step and value wherever the log has a number under the key."""
    points = []
    for line in lines:
        value = line.get(key)
        if isinstance(value, (int, float)):
            points.append((line["step"], value))
    return points


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Average neighbouring points if there are 80 or more, which leaves about 40."""
    size = max(1, len(points) // 40)
    smoothed = []
    for first in range(0, len(points), size):
        neighbours = points[first : first + size]
        last_step = neighbours[-1][0]
        smoothed.append((last_step, fmean(value for _, value in neighbours)))
    return smoothed


def look(run: int, metric: int, runs: list[str]) -> dict:
    """How a curve is drawn. Runs differ in colour and marker, and metrics in line style.

    If there is only one run, metrics differ in colour too. Colour is never needed to tell curves apart.
    """
    colour = metric if len(runs) == 1 else run
    return {
        "color": COLOURS[colour % len(COLOURS)],
        "marker": MARKERS[run % len(MARKERS)],
        "markersize": 4,
        "linestyle": LINE_STYLES[metric % len(LINE_STYLES)],
    }


def legend_entries(runs: list[str], metrics: list[str]) -> dict[str, Line2D]:
    """One entry per run and one per metric, which takes less room than one per curve."""
    entries = {}
    if len(runs) > 1:
        for number, run in enumerate(runs):
            entries[run] = Line2D([], [], **look(number, 0, runs))
    if len(metrics) > 1:
        for number, metric in enumerate(metrics):
            style = look(0, number, runs)
            if len(runs) > 1:  # the line style alone
                style |= {"color": "#777777", "marker": None}
            entries[metric] = Line2D([], [], **style)
    return entries


def draw(panels: dict[str, list[Curve]], runs: list[str], width: float) -> Figure:
    """Draw panels side by side, with one legend below them. The width is in inches."""
    metrics = []
    for curves in panels.values():
        for curve in curves:
            if curve.metric not in metrics:
                metrics.append(curve.metric)
    entries = legend_entries(runs, metrics)
    is_short = all(len(label) < 28 for label in entries)
    columns = 2 if is_short else 1
    height = 3 + 0.2 * math.ceil(len(entries) / columns)

    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(all_axes, panels.items()):
        for curve in curves:
            steps = [step for step, _ in curve.points]
            values = [value for _, value in curve.points]
            style = look(runs.index(curve.run), metrics.index(curve.metric), runs)
            axes.plot(steps, values, markevery=math.ceil(len(steps) / 20), **style)
        axes.set(title=printable(title), xlabel="step", ylim=LIMITS.get(title))
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)

    labels = [printable(label) for label in entries]
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    if entries:
        figure.legend(entries.values(), labels, **place)
    return figure


def panel_svg(title: str, curves: list[Curve], runs: list[str]) -> str:
    """A panel as inline SVG, with a note below it that says what to look for.

    It uses the page's text colour; the first and last values are its description.
    """
    # matplotlib does not know currentColor, so an unused colour stands in for it
    ink = "#010203"
    settings = PLAIN_TEXT | {"svg.fonttype": "none", "svg.hashsalt": title}
    for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        settings[name] = ink
    file = io.StringIO()
    with rc_context(settings):
        figure = draw({title: curves}, runs, width=4.6)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue().replace(ink, "currentColor")
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # ids that every panel uses: a page must not repeat them
    _, _, svg = svg.partition("<svg")  # drop the XML declaration

    ends = []
    for curve in curves:
        label = f"{curve.run}, {curve.metric}" if len(runs) > 1 else curve.metric
        first_value = curve.points[0][1]
        last_value = curve.points[-1][1]
        ends.append(f"{label} from {first_value:.4g} to {last_value:.4g}")
    description = escape(f"{title}: {', '.join(ends)}")
    note = ""
    if title in NOTES:
        note = f"<figcaption>{escape(NOTES[title])}</figcaption>"
    return f'<figure><svg role="img" aria-label="{description}"{svg}{note}</figure>\n'


def curves_html(runs: dict[str, Run]) -> str:
    """All panels."""
    panels = find_panels(runs)
    parts = ['<h2>Curves</h2>\n<div class="curves">']
    for title, curves in panels.items():
        parts.append(panel_svg(title, curves, list(runs)))
    if not panels:
        parts.append("No metrics yet.")
    parts.append("</div>\n")
    return "".join(parts)


def draw_picture(runs: dict[str, Run], path: str) -> Figure:
    """Draw accuracy and KL side by side, to an image file in any format that matplotlib writes."""
    panels = find_panels(runs)
    if not panels:
        raise BadInput(f"{', '.join(runs)}: no metrics to draw")
    shown = {title: panels.get(title, []) for title in ("accuracy", "KL to the reference")}
    with rc_context(PLAIN_TEXT | {"svg.hashsalt": "picture"}):
        figure = draw(shown, list(runs), width=9)
        figure.savefig(path, metadata={"Date": None})
    return figure


# ---------------------------------------------------------------- a training run


def run_page(run: Run) -> str:
    """The page of one run."""
    parts = [f"<p>{escape(progress(run))}</p>\n"]
    if not has_model(run.folder):
        parts.append("<p>If the run is still going, make the page again to see more.</p>\n")
    parts.append(curves_html({run.folder: run}))
    samples = read_log(os.path.join(run.folder, "samples.jsonl"))
    if samples:
        parts.append(groups_html(run.folder, samples))

    parts.append("<h2>Settings</h2>\n")
    if run.settings:
        parts.append(table(list(run.settings.items())))
    else:
        parts.append("<p>not recorded</p>")
    parts.append("<h2>Code</h2>\n")
    for code in run.code:
        parts.append(f"<p>From step {escape(code.step)}: {code_line(run, code, run.folder)}</p>\n")
        if code.patch:
            parts.append(patch_html(code.patch_text))
    if not run.code:
        parts.append("<p>not recorded</p>")
    return page(run.folder, "".join(parts))


def code_line(run: Run, code: Code, page_folder: str) -> str:
    """An entry of code.json in one line, with a link to its patch."""
    facts = []
    if code.commit:
        facts.append(escape(f"commit {code.commit}"))
        if not code.patch:
            facts.append("no changes")
    else:
        facts.append("no git commit")
    if code.patch:
        patch = os.path.join(run.folder, code.patch)
        facts.append("with changes: " + link(patch, code.patch, page_folder))
    for package, version in code.versions.items():
        facts.append(escape(f"{package} {version}"))
    return ", ".join(facts)


def patch_html(patch: str) -> str:
    """The start of a patch, collapsed."""
    lines = patch.splitlines()
    heading = f"the changes ({len(lines)} lines)"
    if len(lines) > MAX_PATCH_LINES:
        heading = f"the changes (the first {MAX_PATCH_LINES} of {len(lines)} lines)"
    text = escape("\n".join(lines[:MAX_PATCH_LINES]))
    return f"<details><summary>{heading}</summary><pre>{text}</pre></details>\n"


def groups_html(folder: str, samples: list[dict]) -> str:
    """The groups of each prompt, with one slider for the steps. A long run shows only every n-th step."""
    steps = sorted({row["step"] for row in samples}, reverse=True)
    n = math.ceil(len(samples) / MAX_ITEMS)
    shown_steps = sorted(steps[::n])  # includes the last step
    about = (
        "The prompts and the random numbers are the same at every step, so only the policy changes. "
        "The advantage compares a completion with its group: those above 0 become more likely. "
        f"The page shows {len(shown_steps)} of {len(steps)} steps."
    )
    parts = [f"<h2>Groups</h2>\n<p>{about}</p>\n<div>"]  # the slider stays in view up to the end of the div
    # hidden without JavaScript; then all groups are visible
    list_of_steps = escape(" ".join(map(str, shown_steps)))
    slider = f'<input type="range" max="{len(shown_steps) - 1}" value="0" data-steps="{list_of_steps}">'
    parts.append(f'<p class="slider" hidden><label>step {slider} <output></output></label></p>\n')

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
        for row in rows:
            parts.append(group_html(row))
        parts.append("</article>\n")
    parts.append("</div>\n")
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


# ---------------------------------------------------------------- several runs


def comparison_page(runs: dict[str, Run], page_folder: str) -> str:
    """The page of several runs, by name: their curves, and how their settings and code differ."""
    parts = ["<ul>"]
    for name, run in runs.items():
        report = os.path.join(run.folder, "report.html")
        text = escape(f"{name}: {progress(run)}")
        if os.path.exists(report):
            text += ", " + link(report, "its report", page_folder)
        parts.append(f"<li>{text}</li>\n")
    parts.append("</ul>\n")
    parts.append(curves_html(runs))
    parts.append(different_settings(runs))
    parts.append(different_code(runs, page_folder))
    return page(", ".join(runs), "".join(parts))


def different_settings(runs: dict[str, Run]) -> str:
    """A table of the settings that differ, except the output folder."""
    parts = ["<h2>Settings that differ</h2>\n"]
    recorded = {name: run.settings for name, run in runs.items() if run.settings}
    missing = [name for name in runs if name not in recorded]
    if missing:
        parts.append(f"<p>not recorded: {escape(', '.join(missing))}</p>\n")

    keys = {}  # in the order of run.json
    for settings in recorded.values():
        keys |= settings
    rows = []
    for key in keys:
        values = [settings.get(key, "(no such setting)") for settings in recorded.values()]
        if key != "output" and any(value != values[0] for value in values):
            rows.append((key, *values))
    if rows:
        parts.append(f'<div class="scroll">{table(rows, list(recorded))}</div>\n')
    elif len(recorded) > 1:
        parts.append("<p>none</p>\n")
    return "".join(parts)


def different_code(runs: dict[str, Run], page_folder: str) -> str:
    """Whether the runs ended with the same code, and the code of each."""
    codes = set()
    is_known = True
    lines = []
    for name, run in runs.items():
        if not run.code:
            is_known = False
            lines.append(f"<li>{escape(name)}: not recorded</li>\n")
            continue
        last = run.code[-1]
        if last.commit:
            codes.add((last.commit, last.patch_text))
        else:
            is_known = False
        since = f" (since step {last.step})" if len(run.code) > 1 else ""
        lines.append(f"<li>{escape(name + since)}: {code_line(run, last, page_folder)}</li>\n")

    if len(codes) > 1:
        verdict = "The code differs."
    elif is_known:
        verdict = "The code is the same."
    else:
        verdict = "The code may differ: not every run recorded a commit."
    return f"<h2>Code</h2>\n<p>{verdict}</p>\n<ul>{''.join(lines)}</ul>\n"


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
    """The page of two evaluations, over the questions they share: accuracies, and answers that changed."""
    first_path = os.path.join(first_folder, "predictions.json")
    first = read_marks(first_path)
    second = read_marks(os.path.join(second_folder, "predictions.json"))
    shared = [question for question in first if question in second]
    if not shared:
        raise BadInput(f"has no question in common with {first_folder}")
    first_results = read_json(os.path.join(first_folder, "results.json"))
    second_results = read_json(os.path.join(second_folder, "results.json"))
    audio_dir = audio_dir or recorded_audio_dir(second_results)

    items = []
    pairs = []  # (was right before, is right after)
    for question in shared:
        row, before = first[question]
        new_row, after = second[question]
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
    counts = f"<p>{len(items)} of {len(shared)} answers changed."
    only_first = len(first) - len(shared)
    only_second = len(second) - len(shared)
    if only_first or only_second:
        counts += f" {len(shared)} questions are in both evaluations and are compared;"
        counts += f" {only_first} are only in the first, {only_second} only in the second."
    content = accuracy_html(rows) + counts + "</p>\n" + items_html(items, second_folder)

    facts = []
    for name, value in second_results.items():
        if is_fact(value):
            facts.append((name, first_results.get(name, ""), value))
    title = f"{first_folder} and {second_folder}"
    return page(title, f"{content}<h2>Settings</h2>\n{table(facts)}")


def recorded_audio_dir(results: dict) -> str:
    """The folder where an evaluation looked for its clips."""
    return results.get("audio_dir") or os.path.dirname(results.get("data", ""))


def is_fact(value: object) -> bool:
    """Whether a value from results.json fits in a cell of the settings table."""
    return isinstance(value, (str, int, float))


def example_of(row: dict, location: str, audio_dir: str) -> Example:
    """A row of predictions as an example; if it is unusable, whatever can be shown, and the reason."""
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


def kind_of(folder: str) -> str:
    """Whether a folder holds a run or an evaluation. Raises BadInput if it holds neither."""
    for name in ("metrics.jsonl", "samples.jsonl"):  # a run writes samples first
        if os.path.exists(os.path.join(folder, name)):
            return "run"
    if os.path.exists(os.path.join(folder, "predictions.json")):
        return "evaluation"
    raise BadInput(f"{folder}: neither a run (metrics.jsonl) nor an evaluation (predictions.json)")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", help="one or more training runs, or one or two evaluations")
    parser.add_argument("--audio_dir", default="", help="folder of an evaluation's clips, if they have moved")
    parser.add_argument("--picture", default="", help="save a plot of the runs' accuracy and KL to this file")
    flags = parser.parse_args()

    folders = flags.folders
    last = folders[-1]
    kinds = [kind_of(folder) for folder in folders]
    if "run" in kinds and "evaluation" in kinds:
        run = folders[kinds.index("run")]
        evaluation = folders[kinds.index("evaluation")]
        raise BadInput(f"{run} is a run and {evaluation} an evaluation: they cannot share a page")
    if kinds.count("evaluation") > 2:
        raise BadInput(f"only two evaluations can be compared, not {len(kinds)}")
    if flags.picture and "evaluation" in kinds:
        raise BadInput(f"--picture {flags.picture}: only runs have curves, and {last} is an evaluation")

    if "run" in kinds:
        runs = read_runs(folders)
        if flags.picture:
            with located(f"--picture {flags.picture}"):
                draw_picture(runs, flags.picture)
    with located(last):
        if kinds == ["run"]:
            name = "report.html"
            content = run_page(*runs.values())
        elif "run" in kinds:
            name = "compared.html"
            content = comparison_page(runs, last)
        elif kinds == ["evaluation"]:
            name = "report.html"
            content = evaluation_page(last, flags.audio_dir)
        else:
            name = "changed.html"
            content = changes_page(*folders, flags.audio_dir)

    target = os.path.join(last, name)
    write_atomically(target, content)
    say(f"page written to {target}")


if __name__ == "__main__":
    run_main(main)
