"""A run or an evaluation as one page, to look at and to listen to.

    python report.py runs/grpo                         # training: curves, and the same prompts over the steps
    python report.py runs/eval                         # an evaluation: accuracy, all questions and answers
    python report.py runs/before runs/after            # two: the questions whose answers changed
    python report.py runs/grpo --picture curves.svg    # accuracy and KL also as a picture

It is `report.html` in the folder, or `changed.html` in the second of two, and loads nothing but long clips,
from where they lie. What came from data or a model is text in it, whatever it looks like.
"""

import argparse
import base64
import glob
import hashlib
import html
import io
import os
import re
from urllib.parse import quote

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from checkpoints import read_metrics
from data import BadInput, Example, blame, open_audio, printable, read_rows, to_example, write_whole
from evaluate import read_json, read_marks
from flags import run_main
from model import LOADABLE
from rewards import GROUPS, judge, paired_difference, prediction_of

MOST = 2_000  # groups or questions on a page
CLIP_BYTES, ALL_CLIPS_BYTES = 1_000_000, 10_000_000  # inside the page: a clip, all; others are linked
WORDS = {True: "right", False: "wrong", None: "not scored"}

STYLE = """
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: auto; padding: 1rem }
svg { width: 100%; height: auto } figure { margin: 0 } audio { width: min(24rem, 100%); display: block }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
article { border-top: 1px solid GrayText; padding: .5rem 0 1rem }
td, th { padding: .2rem .6rem; text-align: left; vertical-align: top }
.said, td, h1, h3, li, [scope=row] { white-space: pre-wrap; overflow-wrap: anywhere }
form { position: sticky; top: 0; padding: .5rem 0; background: Canvas }
form { display: flex; flex-wrap: wrap; gap: .5rem 1rem }
input[type=range] { width: min(30rem, 60vw); vertical-align: middle } [hidden] { display: none !important }
"""
SCRIPT = """
const all = (query, within) => [...within.querySelectorAll(query)];
for (const slider of all("input[type=range]", document)) {  // shows one step of a prompt
  const groups = all("section", slider.closest("article"));
  slider.oninput = () => {
    groups.forEach((group, i) => group.hidden = i != slider.value);
    slider.nextElementSibling.value = slider.ariaValueText = groups[slider.value].dataset.step;
  };
  slider.closest("p").hidden = false;
  slider.oninput();
}
for (const form of document.forms) {  // shows the questions that were asked for
  const items = all("article", document), texts = items.map(item => item.textContent.toLowerCase());
  form.oninput = () => {
    const text = form.elements.text.value.toLowerCase(), chosen = all("select", form).filter(s => s.value);
    const fits = item => chosen.every(s => item.getAttribute("data-" + s.name) == s.value);
    items.forEach((item, i) => item.hidden = !(texts[i].includes(text) && fits(item)));
    const shown = items.filter(item => !item.hidden).length;
    form.elements.count.value = `${shown} of ${items.length} shown`;
  };
  form.onsubmit = event => event.preventDefault();
  form.hidden = false;
  form.oninput();
}
"""


def text(value: object) -> str:
    """Anything as text of the page, in an element or in a quoted attribute."""
    return html.escape(printable(str(value)))


def page(title: str, *parts: str) -> str:
    """A whole page, which runs no script but its own."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    policy += "; media-src data: file: 'self'; base-uri 'none'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{text(title)}</title>
<style>{STYLE}</style></head><body><main><h1>{text(title)}</h1>
{"".join(parts)}</main><script>{SCRIPT}</script></body></html>
"""


def table(*rows: tuple) -> str:
    """Rows of text, each of which begins with its name."""
    names = [f'<th scope="row">{text(name)}</th>' for name, *_ in rows]
    cells = ["".join(f"<td>{text(cell)}</td>" for cell in row) for _, *row in rows]
    return f"<table>{''.join(f'<tr>{name}{row}</tr>' for name, row in zip(names, cells))}</table>"


def question(audio: str, asked: str, choices: list, answer: str | None, folder: str, room: list[int]) -> str:
    """A question with its clip and options; the clip is in the page if it is short and there is room left."""
    marks = [" (the answer)" if choice == answer else "" for choice in choices]
    listed = "".join(f"<li>{text(choice)}{mark}</li>" for choice, mark in zip(choices, marks))
    start = f"<h3>{text(asked)}</h3><ul>{listed}</ul>"
    if not audio:
        return start
    try:
        with open_audio(audio) as file:
            seconds, kind = file.frames / file.samplerate, file.format
    except BadInput as error:
        return f"{start}<p>{text(error)}</p>"
    source = quote(os.path.relpath(audio, folder))
    preload, size = "none", os.path.getsize(audio)
    if size <= min(CLIP_BYTES, room[0]):
        room[0] -= size
        preload, kind = "metadata", {"FLAC": "flac", "MP3": "mpeg", "OGG": "ogg"}.get(kind, "wav")
        with open(audio, "rb") as file:
            source = f"data:audio/{kind};base64,{base64.b64encode(file.read()).decode()}"
    label = f"clip of {seconds:.1f} s"
    return f'{start}<audio controls preload="{preload}" src="{source}" aria-label="{label}"></audio>{label}'


# ---------------------------------------------------------------- curves

PANELS = {  # title: {label: key of metrics.jsonl}
    "accuracy": {"held-out questions, greedy": "eval_accuracy", "samples": "reward_accuracy"},
    "KL to the reference": {"samples": "kl"},
    "reward": {"mean": "reward"},
    "completion length, tokens": {"mean": "completion_tokens"},
    "groups that teach nothing, share": {"mean": "zero_std_groups"},
    "clipped tokens, share": {"mean": "clip_fraction"},
    "loss": {"mean": "loss"},
}
COLOURS = ["#2a7de1", "#d9541e", "#2e9e5b", "#a259d9", "#8a8a2a", "#c03a6b", "#777777"]


def means(lines: list[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric; where it was measured 80 times or more, some 40 means over as many each."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    n = max(1, len(found) // 40)
    parts = [found[i : i + n] for i in range(0, len(found), n)]
    return [(part[-1][0], np.mean([value for _, value in part])) for part in parts]


def find_panels(lines: list[dict]) -> dict[str, dict[str, list]]:
    """{title: {label: points}} of what a run has measured."""
    phases = sorted({key for line in lines for key in line if key.startswith("seconds_")})
    wanted = PANELS | {"seconds of a step": {key.removeprefix("seconds_"): key for key in phases}}
    found = {title: {label: means(lines, keys[label]) for label in keys} for title, keys in wanted.items()}
    return {title: kept for title in found if (kept := {k: v for k, v in found[title].items() if v})}


def plot(axes, title: str, curves: dict[str, list]) -> None:
    for i, (label, points) in enumerate(curves.items()):
        style = dict(color=COLOURS[i % 7], linestyle=["-", "--", ":"][i % 3])
        axes.plot(*zip(*points), label=label, marker="." if len(points) < 20 else None, **style)
    limits = {"accuracy": (0, 1), "KL to the reference": (0, None)}
    axes.set(title=title, xlabel="step", ylim=limits.get(title))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(frameon=False)


def inline_svg(title: str, curves: dict[str, list]) -> str:
    """A panel for the page, in the page's own colour of text, with its ends in words."""
    ink, file = "#010203", io.StringIO()  # stands for currentColor, which matplotlib does not know
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, **dict.fromkeys(inked, ink)}):
        figure = Figure(figsize=(4.6, 3), layout="tight")
        plot(figure.subplots(), title, curves)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    ends = [f"{label} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for label, points in curves.items()]
    svg = re.sub(r'<g id="[^"]*">', "<g>", file.getvalue()).replace(ink, "currentColor")
    described = f'<svg role="img" aria-label="{text(title)}: {text(", ".join(ends))}"'
    return f"<figure>{described}{svg.partition('<svg')[2]}</figure>"


def draw_picture(lines: list[dict], target: str) -> Figure:
    """Accuracy and KL side by side, as a file of its own."""
    figure, found = Figure(figsize=(9, 3.2), layout="tight"), find_panels(lines)
    for axes, title in zip(figure.subplots(1, 2), PANELS):
        plot(axes, title, found.get(title, {}))
    with rc_context({"svg.hashsalt": "picture"}):
        figure.savefig(target, metadata={"Date": None})
    return figure


# ---------------------------------------------------------------- a training run


def run_page(folder: str, lines: list[dict], samples: list[dict]) -> str:
    """Settings, curves and groups of a run, which may still be going."""
    places = (os.path.join(glob.escape(folder), place, "run.json") for place in ("checkpoint-*", ""))
    saved = sorted((path for place in places for path in glob.glob(place)), key=os.path.getmtime)
    settings = read_json(saved[-1]) if saved else {}
    done = any(os.path.exists(os.path.join(folder, name)) for name in LOADABLE)
    steps = f"{sum('loss' in line for line in lines)} of {settings.get('max_steps', 'unknown')} steps"
    parts = [f"<p>{text(steps)}, {'finished' if done else 'not finished'}.</p><h2>Curves</h2>"]
    curves = "".join(inline_svg(*panel) for panel in find_panels(lines).items())
    parts.append(f'<div class="curves">{curves or "None yet."}</div>')
    every = -(-len(samples) // MOST)
    numbers = sorted({row["step"] for row in samples})
    kept, room, prompts = set(numbers[::-1][:: every or 1]), [ALL_CLIPS_BYTES], {}
    for row in samples:
        if row["step"] in kept:
            prompts.setdefault((row["audio"], row["question"], *row["choices"]), []).append(row)
    about = f"""<h2>Groups</h2><p>The same prompts and the same random numbers: what changes is the policy.
        Advantage says how much better than its group a completion is; above 0 it is made likelier.
        {len(kept)} of {len(numbers)} steps are on this page.</p>"""
    parts.append(about if samples else "")
    for rows in prompts.values():
        asked = [rows[0][key] for key in ("audio", "question", "choices", "answer")]
        slider = f'<input type="range" max="{len(rows) - 1}" value="0"> <output></output>'
        parts.append(f"<article>{question(*asked, folder, room)}<p hidden><label>step {slider}</label></p>")
        parts += [*map(group, rows), "</article>"]
    known = table(*settings.items()) if settings else "They come with the first checkpoint."
    return page(folder, *parts, f"<h2>Settings</h2>{known}")


def group(row: dict) -> str:
    """The completions of a group, coloured by advantage, which stands there as a number too."""
    lines, mean = [], np.mean(row["rewards"])
    for o, r, A in zip(row["completions"], row["rewards"], row["advantages"], strict=True):
        colour = f"rgb({'30 120 230' if A > 0 else '230 110 20'} / {min(abs(A), 2) / 5:.2f})"
        numbers = f"<td>{r:g}</td><td>{A:+.2f}</td>"
        lines.append(f'<tr style="background: {colour}">{numbers}<td class="said">{text(o)}</td></tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ("reward", "advantage", "completion"))
    start = f'<section data-step="{row["step"]}"><h4>step {row["step"]}, mean reward {mean:.2f}</h4>'
    return f"{start}<table><tr>{head}</tr>{''.join(lines)}</table></section>"


# ---------------------------------------------------------------- evaluations


def readable(row: object, location: str, audio_dir: str) -> tuple[Example, bool | None]:
    """A row of predictions and whether it is right; of one that cannot be used, what can be shown."""
    try:
        mark = judge(row, location)
    except BadInput:
        mark = False  # as evaluate.py counts it
    try:
        with blame(location):
            return to_example(row, location, audio_dir), mark
    except BadInput as error:
        row = row if isinstance(row, dict) else {}
        asked, choices, answer = map(row.get, ("question", "choices", "answer"))
        choices = choices if isinstance(choices, list) else []
        return Example("", str(asked), choices, answer, row, location, str(error)), mark


def evaluation_page(folders: list[str], audio_dir: str) -> str:
    """Accuracy and all questions of an evaluation, or the questions whose answers two of them differ in."""
    paths = [os.path.join(folder, "predictions.json") for folder in folders]
    every = [read_json(os.path.join(folder, "results.json")) for folder in folders]
    results = every[-1]
    audio_dir = audio_dir or results.get("audio_dir") or os.path.dirname(results.get("data", ""))
    parts, items = [], []
    if len(folders) == 1:
        rows, digest = read_rows(paths[0])
        if results.get("predictions_sha256") != digest:
            way = f"python evaluate.py --score {paths[0]} makes it"
            raise BadInput(f"no results.json of these predictions; {way}")
        scores = [("overall", results)] if results["total"] else []
        scores += [(f"{key} {name}", part) for key, by in results["by"].items() for name, part in by.items()]
        for name, part in scores:
            if part["total"]:
                low, high = part["interval"]
                counts = f"{part['correct']} of {part['total']}"
                parts.append((name, f"{part['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", counts))
        for row, location in rows:
            example, mark = readable(row, location, audio_dir)
            items.append((example, WORDS[mark], [(WORDS[mark], example.row)]))
    else:
        first, second = map(read_marks, paths)
        if first.keys() != second.keys():
            raise BadInput(f"the questions are not those of {folders[0]}")
        for key, (row, before) in first.items():
            other, after = second[key]
            if (before, prediction_of(row)) != (after, prediction_of(other)):
                kind = "another answer" if before == after else f"now {WORDS[after]}"
                answers = [(f"first, {WORDS[before]}", row), (f"second, {WORDS[after]}", other)]
                items.append((readable(row, paths[0], audio_dir)[0], kind, answers))
        pairs = [(mark, second[key][1]) for key, (_, mark) in first.items() if mark is not None]
        for i, folder in enumerate(folders):
            parts.append((folder, f"{np.mean([pair[i] for pair in pairs]):.1%}" if pairs else "not scored"))
        if pairs:
            d, low, high, p = paired_difference(pairs)
            parts.append(("difference", f"{d:+.1%} ({low:+.1%} to {high:+.1%}), McNemar p {p:.2g}"))
        parts.append(("changed", f"{len(items)} of {len(first)} answers"))
    scored = table(*parts) if parts else "<p>There are no answers to compare with.</p>"
    names = [name for name, value in results.items() if isinstance(value, (str, int, float))]
    facts = [(name, *(results.get(name, "") for results in every)) for name in names]
    scored = f"<h2>Accuracy</h2><p>With 95 % intervals.</p>{scored}"
    listed = list_items(items, folders[-1])
    return page(" and ".join(folders), scored, listed, "<h2>Settings</h2>", table(*facts))


def list_items(items: list[tuple], folder: str) -> str:
    """Questions, and a form that filters them. items: an example, its kind, and pairs of a word and a row."""
    wrong_first = sorted(range(len(items)), key=lambda i: items[i][1] in ("right", "another answer"))
    kept = [items[i] for i in sorted(wrong_first[:MOST])]
    count = f"{len(kept)} of {len(items)} are on this page; of more than {MOST}, wrong ones come first."
    data = [
        {key: str(e.row[key]) for key in GROUPS if key in e.row} | {"result": kind} for e, kind, _ in kept
    ]
    parts, room = [f'<h2>Questions</h2><p>{count}</p><form hidden aria-label="filter">'], [ALL_CLIPS_BYTES]
    for name in ("result", *GROUPS):
        values = sorted({row[name] for row in data if name in row})
        listed = "".join(f"<option>{text(value)}</option>" for value in values)
        select = f'<select name="{name}"><option value="">all</option>{listed}</select>'
        parts.append(f"<label>{name} {select}</label>" if values else "")
    search = '<label>text <input type="search" name="text"></label>'
    parts.append(f'{search} <output name="count"></output></form>')
    for (example, _, answers), values in zip(kept, data):
        attributes = " ".join(f'data-{name}="{text(value)}"' for name, value in values.items())
        asked = example.audio, example.question, example.choices, example.answer
        parts.append(f"<article {attributes}>{question(*asked, folder, room)}<p>{text(example.problem)}</p>")
        for word, row in answers:
            said = text(row.get("completion") or prediction_of(row) or "(nothing)")
            parts.append(f'<p>{word}: <span class="said">{said}</span></p>')
        parts.append("</article>")
    return "".join(parts)


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("folders", nargs="+", help="a training run, an evaluation, or two evaluations")
    parser.add_argument("--audio_dir", default="", help="an evaluation's clips; empty: where it read them")
    parser.add_argument("--picture", default="", help="file for a picture of a run's accuracy and KL")
    config = parser.parse_args()
    *before, folder = config.folders
    (lines, _), (samples, _) = (read_metrics(folder, name) for name in ("metrics.jsonl", "samples.jsonl"))
    with blame(folder):
        if (lines or samples) and not before:
            content = run_page(folder, lines, samples)
        elif len(before) < 2 and os.path.exists(os.path.join(folder, "predictions.json")):
            content = evaluation_page(config.folders, config.audio_dir)
        else:
            raise BadInput("neither a run (metrics.jsonl) nor one or two evaluations (predictions.json)")
        if config.picture and not lines:
            raise BadInput("--picture draws a run's metrics.jsonl, and there is none")
        if config.picture:
            draw_picture(lines, config.picture)
    write_whole(target := os.path.join(folder, "changed.html" if before else "report.html"), content)
    print(f"the page is {target}")


if __name__ == "__main__":
    run_main(main)
