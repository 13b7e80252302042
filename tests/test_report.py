"""The page of a run or an evaluation: read with a parser, and in a browser if there is one."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import torch
from conftest import run_script, write

from cli import BadInput, printable
from evaluate import score_file
from rewards import paired_difference, wilson_interval
from tools import report

NASTY = [
    "<script>document.title = 'run'</script>",
    "</style></script><script>document.title = 'run'</script>",
    "\"><img src=x onerror=\"document.title='run'\">'",
    "a\x00b\x1b[31m\x07\u202ec\r\n\ud800",
    "x" * 10_000,
    "&lt;b&gt; &amp; &#60; ]]> <!-- {{ $x$",
]
ESCAPED = [printable(text) for text in NASTY]


class Page(HTMLParser):
    """The elements of a page: tag, attributes, and the text that directly follows the tag."""

    def __init__(self, content):
        super().__init__()
        self.elements = []
        self.inside = None
        self.text = ""  # without scripts and styles
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.elements[-1][2] += data
        if self.inside not in ("script", "style"):
            self.text += data

    def all(self, wanted):
        return [attributes for tag, attributes, _ in self.elements if tag == wanted]

    def texts(self, wanted):
        return [text for tag, _, text in self.elements if tag == wanted]

    def kinds(self):
        return {(tag, *sorted(attributes)) for tag, attributes, _ in self.elements}


@pytest.fixture
def show(monkeypatch):
    """Make the page of one or more folders, and read it."""

    def make(*folders, flags=()):
        monkeypatch.setattr("sys.argv", ["report", *map(str, folders), *map(str, flags)])
        report.main()
        name = "report.html"
        if len(folders) > 1:
            is_evaluation = (folders[-1] / "predictions.json").exists()
            name = "changed.html" if is_evaluation else "compared.html"
        return Page((folders[-1] / name).read_text(encoding="utf-8"))

    return make


def make_run(path, folder, lines=None, steps=3, **changes):
    """A run with groups of one prompt; `changes` replace parts of the groups."""
    path.mkdir()
    write(path / "metrics.jsonl", lines or [{"step": step, "loss": 0.1} for step in range(steps)])
    group = {"audio": str(folder / "train/0000.wav"), "question": "What beeps?", "choices": ["a", "b"]}
    group |= {"answer": "b", "completions": ["no", "yes"], "rewards": [0.0, 2.0], "advantages": [-0.5, 1.5]}
    write(path / "samples.jsonl", [{"step": step, **group, **changes} for step in range(steps)])
    return path


def record_code(run, *entries):
    """Write code.json from pairs of commit and patch; the entries start at steps 0, 10, 20, ..."""
    codes = []
    for i, (commit, patch) in enumerate(entries):
        code = {"step": 10 * i, "commit": commit, "patch": "", "versions": {"torch": f"2.{i}"}}
        if patch:
            code["patch"] = f"code #{i}.patch"
            (run / code["patch"]).write_text(patch)
        codes.append(code)
    (run / "code.json").write_text(json.dumps(codes))


AGAIN = "If the run is still going, make the page again to see more."


def descriptions(page):
    return [svg["aria-label"] for svg in page.all("svg")]


def make_evaluation(path, rows, answers=None):
    """Scored predictions, which are correct except for `answers` {index: text}."""
    path.mkdir()
    predictions = []
    for i, row in enumerate(rows):
        text = (answers or {}).get(i, row["answer"])
        predictions.append({"completion": f"<{text}>", **row, "model_output": text})
    write(path / "predictions.json", predictions, as_list=True)
    score_file(str(path / "predictions.json"))
    return path


@pytest.fixture
def rows(folder):
    """The toy's 12 test questions, with absolute paths of the clips."""
    rows = [json.loads(line) for line in open(folder / "test.jsonl")]
    return [row | {"audio": str(folder / row["audio"])} for row in rows]


@pytest.fixture
def long_clip(tmp_path):
    """A clip that is too large to embed, with a name that must be quoted in a URL."""
    path = tmp_path / "a #1 %.wav"
    soundfile.write(path, np.zeros(32 * 16_000), 16_000)
    return path


# ---------------------------------------------------------------- a run


def test_the_page_of_a_real_run(folder, tmp_path, show):
    run = tmp_path / "run"
    run_script("train_grpo", folder, run, samples_every=1, eval_data=str(folder / "test.jsonl"))
    page = show(run)
    assert "2 of 2 steps (finished)" in page.text and "prompts_per_step" in page.text
    assert AGAIN not in page.texts("p") and len(page.all("input")) == 1
    assert f"torch {torch.__version__}" in page.text  # from code.json
    titles = [description.split(":")[0] for description in descriptions(page)]
    assert titles[: len(report.PANELS)] == list(report.PANELS) and "reward_format" in titles
    assert [section["data-step"] for section in page.all("section")] == ["0", "1", "2"] * 4
    for line in open(run / "samples.jsonl", encoding="utf-8"):
        assert set(map(printable, json.loads(line)["completions"])) <= set(page.texts("td"))


def test_curves_and_groups(folder, tmp_path, show):
    """An evaluation has its own line, so a step can have two. A fork's own metric gets its own panel."""
    first = {"loss": 0.5, "reward": 1.0, "reward_accuracy": 0.5, "reward_brevity": 0.5, "lr": 0.1}
    first |= {"seconds_sample": 1.0, "seconds_update": 2.0, "my metric": 8, "note": "none"}
    second = first | {"reward_accuracy": 0.25, "reward_brevity": 0.125, "seconds_update": 3.0, "my metric": 9}
    lines = [{"step": 0, "eval_accuracy": 0.25, "eval_accuracy_silent": 0.125}, {"step": 0, **first}]
    lines += [{"step": 1, **second}, {"step": 2, "eval_accuracy": 1, "eval_accuracy_silent": 0.5}]
    page = show(make_run(tmp_path / "run", folder, lines, steps=1))
    assert "2 steps (not finished)" in page.text
    assert descriptions(page) == [
        "accuracy: held-out questions, greedy from 0.25 to 1, samples from 0.5 to 0.25, "
        "held-out, with silence from 0.125 to 0.5",
        "reward: sum of all parts from 1 to 1",
        "loss: mean from 0.5 to 0.5",
        "seconds per step: sample from 1 to 1, update from 2 to 3",
        "reward_brevity: reward_brevity from 0.5 to 0.125",
        "my metric: my metric from 8 to 9",
    ]
    assert {"seconds per step", "update", "my metric"} <= set(page.texts("text"))  # drawn, too
    known = ["accuracy", "reward", "loss", "seconds per step"]
    assert page.texts("figcaption") == [report.NOTES[title] for title in known]

    colours = [row["style"] for row in page.all("tr") if "style" in row]
    assert colours == ["background: rgb(230 110 20 / 0.10)", "background: rgb(30 120 230 / 0.30)"]
    assert page.texts("td") == ["0", "-0.50", "no", "2", "+1.50", "yes"]
    clip = base64.b64encode((folder / "train/0000.wav").read_bytes()).decode()
    assert [player["src"] for player in page.all("audio")] == [f"data:audio/wav;base64,{clip}"]


def test_a_run_that_is_still_going(folder, tmp_path, show):
    """Its logs may end in half a line, and samples are written first. SFT writes no groups."""
    run = make_run(tmp_path / "run", folder, steps=1)
    (run / "run.json").write_text('{"max_steps": 7}')
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 1, "l')
    page = show(run)
    assert "1 of 7 steps (not finished)" in page.text and AGAIN in page.texts("p")
    assert len(page.all("svg")) == len(page.all("section")) == 1

    (run / "metrics.jsonl").rename(run / "metrics")
    page = show(run)
    assert "0 of 7 steps" in page.text and not page.all("svg") and len(page.all("section")) == 1

    (run / "metrics").rename(run / "metrics.jsonl")
    (run / "samples.jsonl").unlink()
    (run / "run.json").unlink()  # as in a run of an earlier version
    page = show(run)
    assert page.texts("h2") == ["Curves", "Settings", "Code"]
    assert "(not finished)" in page.text and page.text.count("not recorded") == 2


def test_the_code_of_a_run(folder, tmp_path, show):
    run = make_run(tmp_path / "run", folder)
    lines = [f"+line {i}" for i in range(1_000)]
    record_code(run, ("abc", ""), ("abc", "+<b>new</b>"), ("def", "\n".join(lines)), ("", ""))
    page = show(run)
    paragraphs = page.texts("p")
    assert "From step 0: commit abc, no changes, torch 2.0" in paragraphs
    assert "From step 10: commit abc, with changes: " in paragraphs
    assert "From step 30: no git commit, torch 2.3" in paragraphs
    patches = [unquote(link["href"]) for link in page.all("a")]
    assert patches == ["code #1.patch", "code #2.patch"]
    assert page.texts("pre") == ["+<b>new</b>", "\n".join(lines[:200])]
    assert "the changes (the first 200 of 1000 lines)" in page.texts("summary")


def test_text_from_data_stays_text(folder, tmp_path, show, rows):
    lines = [{"step": 0, "reward": 1.0, "reward_<b>": 1.0, "$\\frac$": 1.0}]
    plain = show(make_run(tmp_path / "plain", folder, lines))
    group = {"completions": NASTY, "rewards": [1.0] * 6, "advantages": [0.0] * 6}
    run = make_run(tmp_path / "<b>&amp;", folder, lines, 1, question="".join(NASTY), choices=NASTY, **group)
    page = show(run)
    assert page.kinds() == plain.kinds()
    assert page.texts("td")[2::3] == page.texts("li") == ESCAPED and page.texts("h3") == ["".join(ESCAPED)]
    assert page.texts("title") == page.texts("h1") == [str(run)]

    first = make_evaluation(tmp_path / "first", rows)
    plain = show(first)
    pair = show(first, make_evaluation(tmp_path / "second", rows, dict(enumerate(NASTY))))
    assert pair.kinds() <= plain.kinds()
    assert pair.texts("span")[1::2] == [f"<{text}>" for text in ESCAPED]

    for row, text in zip(rows, NASTY):
        row |= {"task": text, "completion": text, "question": text}
    page = show(make_evaluation(tmp_path / "third", rows))
    assert page.kinds() <= plain.kinds() and set(ESCAPED) <= set(page.texts("option"))
    assert page.texts("span")[:6] == page.texts("h3")[:6] == ESCAPED
    assert [item["data-task"] for item in page.all("article")[:6]] == ESCAPED


def test_only_the_pages_own_script_may_run_and_nothing_is_loaded(folder, tmp_path, show):
    page = show(make_run(tmp_path / "run", folder))
    (script,) = page.texts("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}';" in policy
    for _, attributes, _ in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href") or value.startswith("data:audio/")


def test_long_clips_are_linked(folder, tmp_path, show, long_clip):
    run = make_run(tmp_path / "run", folder, audio=str(long_clip))
    (player,) = show(run).all("audio")
    assert (run / unquote(player["src"])).samefile(long_clip) and "#" not in player["src"]
    long_clip.unlink()
    page = show(run)
    assert not page.all("audio") and f"{long_clip}: no such audio file" in page.text


def test_a_long_run_is_smoothed_and_thinned_out(folder, tmp_path, show):
    lines = [{"step": step, "loss": step} for step in range(2_001)]
    page = show(make_run(tmp_path / "run", folder, lines, steps=2_001))
    assert descriptions(page) == ["loss: mean from 24.5 to 2000"]  # the mean of 50 steps, and of 1
    assert [int(section["data-step"]) for section in page.all("section")] == list(range(0, 2_001, 2))
    assert "1001 of 2001 steps" in page.text


def test_the_picture_shows_accuracy_and_kl(folder, tmp_path, show):
    lines = [{"step": 0, "eval_accuracy": 0.25}, {"step": 0, "reward_accuracy": 0.5, "kl": 0.0}]
    lines += [{"step": 1, "reward_accuracy": 0.75, "kl": 0.1}, {"step": 2, "eval_accuracy": 0.9}]
    run = make_run(tmp_path / "run", folder, lines)
    show(run, flags=["--picture", tmp_path / "curves.svg"])
    assert ElementTree.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")
    figure = report.draw_picture(report.read_runs([str(run)]), str(tmp_path / "curves.png"))
    curves = [line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]
    assert curves == [[[0, 0.25], [2, 0.9]], [[0, 0.5], [1, 0.75]], [[0, 0], [1, 0.1]]]


# ---------------------------------------------------------------- several runs


@pytest.fixture
def three_runs(folder, tmp_path):
    """Two runs of GRPO, the second from an earlier version, and one of SFT."""
    settings = {"model": "m", "lr": 1, "beta": 0.5, "output": "a"}
    grpo = {
        "step": 0,
        "loss": 1.0,
        "reward_accuracy": 0.5,
        "clip_fraction_low": 0.25,
        "clip_fraction_high": 0,
    }
    old = {"step": 0, "loss": 2.0, "reward_accuracy": 0.75, "clip_fraction": 0.125}
    sft = {"step": 0, "loss": 3.0}
    runs = {"a": grpo, "$b<b>": old, "sft/c": sft}
    changes = {"a": {}, "$b<b>": {"output": "b", "lr": 2}, "sft/c": {"output": "c", "beta": None}}
    (tmp_path / "sft").mkdir()
    paths = []
    for name, line in runs.items():
        path = make_run(tmp_path / name, folder, [{"step": 0, "eval_accuracy": 0}, line])
        changed = settings | changes[name]
        if changed["beta"] is None:  # SFT has no such setting
            del changed["beta"]
        (path / "run.json").write_text(json.dumps(changed))
        paths.append(path)
    return paths


def test_several_runs_share_panels(three_runs, show, tmp_path):
    (three_runs[1] / "report.html").touch()
    page = show(*three_runs, flags=["--picture", tmp_path / "curves.svg"])
    assert page.texts("h1") == ["a, $b<b>, sft/c"]
    assert descriptions(page) == [
        "accuracy: a, held-out questions, greedy from 0 to 0, $b<b>, held-out questions, greedy from 0 to 0, "
        "sft/c, held-out questions, greedy from 0 to 0, a, samples from 0.5 to 0.5, "
        "$b<b>, samples from 0.75 to 0.75",
        "share of clipped tokens: a, ratio too low from 0.25 to 0.25, a, ratio too high from 0 to 0, "
        "$b<b>, either from 0.125 to 0.125",
        "loss: a, mean from 1 to 1, $b<b>, mean from 2 to 2, sft/c, mean from 3 to 3",
    ]
    assert page.texts("text").count("$b<b>") == 3  # in each legend
    assert [link["href"] for link in page.all("a")] == ["../../%24b%3Cb%3E/report.html"]
    assert page.texts("th") == ["a", "$b<b>", "sft/c", "lr", "beta"]  # the output folder does not count
    assert page.texts("td") == ["", "1", "2", "1", "0.5", "0.5", "(no such setting)"]

    # a run has one colour and one marker in all panels, and a metric one line style
    figure = report.draw_picture(report.read_runs(list(map(str, three_runs))), str(tmp_path / "curves.png"))
    held_out, samples = figure.axes[0].lines[:3], figure.axes[0].lines[3:]
    assert [line.get_color() for line in samples] == [line.get_color() for line in held_out[:2]]
    assert len({line.get_color() for line in held_out}) == len({line.get_marker() for line in held_out}) == 3
    assert {line.get_linestyle() for line in held_out} == {"-"}
    assert {line.get_linestyle() for line in samples} == {"--"}


def test_whether_several_runs_have_the_same_code(three_runs, show):
    first, second, third = three_runs
    record_code(first, ("abc", "+new"))
    record_code(second, ("abc", ""), ("abc", "+new"))
    page = show(first, second)
    assert "The code is the same." in page.text
    assert "$b<b> (since step 10): commit abc, with changes: code #1.patch, torch 2.1" in page.text
    hrefs = [link["href"] for link in page.all("a")]
    assert [(second / unquote(href)).read_text() for href in hrefs] == ["+new", "+new"]

    assert "The code may differ" in show(first, third).text  # without code.json
    assert "sft/c: not recorded" in show(first, second, third).text
    for code in (("def", "+new"), ("abc", "+newer"), ("abc", "")):
        record_code(third, code)
        assert "The code differs." in show(first, second, third).text
    record_code(first, ("", ""))
    record_code(third, ("", ""))
    assert "The code may differ" in show(first, third).text  # without git


# ---------------------------------------------------------------- evaluations


def test_the_page_of_an_evaluation(tmp_path, show, rows):
    page = show(make_evaluation(tmp_path / "eval", rows, {0: "no", 5: "no"}))
    low, high = wilson_interval(10, 12)
    assert page.texts("td")[:3] == ["83.3%", f"{low:.1%} to {high:.1%}", "10 of 12"]
    results = [item["data-result"] for item in page.all("article")]
    assert results == ["wrong" if i in (0, 5) else "right" for i in range(12)]
    assert page.text.count(" (correct)") == len(page.all("audio")) == 12
    assert "wrong: <no>" in page.text


def test_an_evaluation_finds_its_clips(folder, tmp_path, show, rows):
    rows = [row | {"audio": os.path.relpath(row["audio"], folder)} for row in rows]
    evaluation = make_evaluation(tmp_path / "eval", rows)
    assert len(show(evaluation).all("audio")) == 0
    assert len(show(evaluation, flags=["--audio_dir", folder]).all("audio")) == 12
    results = json.loads((evaluation / "results.json").read_text())
    for recorded in ({"audio_dir": str(folder)}, {"data": str(folder / "test.jsonl")}):
        (evaluation / "results.json").write_text(json.dumps(results | recorded))
        assert len(show(evaluation).all("audio")) == 12


def test_rows_without_answers_or_clips(tmp_path, show, rows):
    for row in rows:
        row["answer"] = None
    del rows[0]["audio"]
    rows[1]["audio"] = "nowhere.wav"
    page = show(make_evaluation(tmp_path / "eval", rows, dict.fromkeys(range(12), "dog")))
    assert "no answers to compare with" in page.text
    assert {item["data-result"] for item in page.all("article")} == {"not scored"}
    assert "row 1: no audio" in page.text and "nowhere.wav: no such audio file" in page.text
    assert page.texts("h3") == [row["question"] for row in rows] and len(page.all("audio")) == 10


def test_a_large_evaluation_leaves_out_right_answers(tmp_path, show, rows):
    many = [rows[i % 12] | {"id": i} for i in range(2_010)]
    page = show(make_evaluation(tmp_path / "eval", many, {2_005: "no", 2_009: "no"}))
    assert "2000 of 2010 questions" in page.text
    assert [item["data-result"] for item in page.all("article")] == ["right"] * 1_998 + ["wrong"] * 2
    embedded = [player for player in page.all("audio") if player["src"].startswith("data:")]
    assert 0 < len(embedded) < len(page.all("audio")) == 2_000
    assert (tmp_path / "eval" / "report.html").stat().st_size < 20_000_000


def test_answers_that_changed_between_two_evaluations(tmp_path, show, rows):
    first = make_evaluation(tmp_path / "a", rows, {0: "no", 1: "no", 2: "no"})
    second = make_evaluation(tmp_path / "b", rows, {2: "nope", 3: "no"})
    page = show(first, second)
    results = [item["data-result"] for item in page.all("article")]
    assert results == ["now right", "now right", "different answer", "now wrong"]
    d, low, high, p = paired_difference([(i > 2, i not in (2, 3)) for i in range(12)])
    difference = f"{d:+.1%} ({low:+.1%} to {high:+.1%}), McNemar p {p:.2g}"
    assert page.texts("td")[:3] == ["75.0%", "83.3%", difference]
    assert "first (wrong): <no>" in page.text and "second (wrong): <nope>" in page.text
    cells = [text for tag, _, text in page.elements if tag in ("th", "td")]
    assert cells[cells.index("correct") :][:3] == ["correct", "9", "10"]  # of both evaluations


def test_two_evaluations_with_some_questions_in_common(tmp_path, show, rows):
    first = make_evaluation(tmp_path / "a", rows[:8], {0: "no", 5: "no"})
    second = make_evaluation(tmp_path / "b", rows[2:], {0: "no"})
    page = show(first, second)
    assert [item["data-result"] for item in page.all("article")] == ["now wrong", "now right"]
    assert page.texts("td")[:2] == ["83.3%", "83.3%"]  # 5 of the 6
    assert "2 of 6 answers changed. 6 questions are in both" in page.text
    assert "2 are only in the first, 4 only in the second" in page.text


def test_bad_input_gives_one_line_and_no_page(folder, tmp_path, show, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    run = make_run(tmp_path / "run", folder)
    started = make_run(tmp_path / "started", folder)
    (started / "metrics.jsonl").write_text("")
    evaluation = make_evaluation(tmp_path / "eval", rows)
    stale = make_evaluation(tmp_path / "stale", rows)
    (stale / "predictions.json").write_text(json.dumps(rows))
    other = make_evaluation(tmp_path / "other", [row | {"question": "Another?"} for row in rows])
    no_patch = make_run(tmp_path / "no_patch", folder)
    record_code(no_patch, ("abc", "+new"))
    (no_patch / "code #0.patch").unlink()
    cases = [
        ([tmp_path / "empty"], "", "/empty: neither a run"),
        ([run, tmp_path / "empty", run], "", "/empty: neither a run"),
        ([run, run], "", "/run: is given twice"),
        ([run, evaluation], "", "/run is a run and .*/eval an evaluation: they cannot share a page"),
        ([evaluation, evaluation, evaluation], "", "two evaluations can be compared, not 3"),
        ([make_run(tmp_path / "damaged", folder, choices=3)], "", "/damaged: TypeError"),
        ([no_patch, run], "", "/no_patch: code.json: FileNotFoundError"),
        ([stale], "", "/stale: no results.json for these predictions; run python evaluate.py --score"),
        ([other, evaluation], "", "/eval: has no question in common with .*/other"),
        ([evaluation], "x.svg", "--picture x.svg: only runs have curves"),
        ([started], "x.svg", "--picture x.svg: started: no metrics to draw"),
        ([run], "none/x.svg", "--picture none/x.svg: FileNotFoundError"),
        ([run], "x.doc", "--picture x.doc: ValueError"),
    ]
    for folders, picture, message in cases:
        with pytest.raises(BadInput, match=message) as error:
            show(*folders, flags=["--picture", picture])
        assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.html"))


# ---------------------------------------------------------------- in a browser

# chromium prints the harness once it has loaded; the second frame delays that until it is closed
HARNESS = """<!doctype html>
<iframe src="%s" width="360" height="800"></iframe><iframe></iframe><pre></pre>
<script>
const [frame, blocker] = document.querySelectorAll("iframe");
blocker.contentDocument.open();
frame.onload = async () => {
  const page = frame.contentDocument, found = [];
  const all = query => [...page.querySelectorAll(query)];
  const visible = query => all(query).map((e, i) => e.checkVisibility() ? i : -1).filter(i => i >= 0);
  const set = (input, value) => {
    input.value = value;
    input.dispatchEvent(new Event("input", {bubbles: true}));
  };
  const duration = clip => new Promise(done => {
    clip.onloadedmetadata = () => done(clip.duration);
    clip.onerror = () => done(-1);
    clip.load();
  });
  try {
    %s
    document.querySelector("pre").textContent = JSON.stringify(found);
  } finally {
    blocker.contentDocument.close();
  }
};
</script>"""


def in_browser(path, code):
    """What `code` pushes to `found` on the page at `path`, if the browser logs no errors."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no browser here: apt-get install chromium")
    harness = path.with_name("harness.html")
    harness.write_text(HARNESS % (path.name, code))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={path.parent}/profile", "--allow-file-access-from-files"]
    command += ["--dump-dom", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(Page(done.stdout).texts("pre")[0])


def test_a_run_in_a_browser(folder, tmp_path, show, long_clip):
    group = {"completions": NASTY, "rewards": [1.0] * 6, "advantages": [0.0] * 6}
    run = make_run(tmp_path / "run", folder, question="".join(NASTY), **group)
    other = make_run(tmp_path / "other", folder, audio=str(long_clip))
    with open(run / "samples.jsonl", "a") as file:
        file.write((other / "samples.jsonl").read_text())
    show(run)
    code = """found.push(page.title, page.images.length, page.documentElement.scrollWidth);
        found.push(await Promise.all(all("audio").map(duration)), visible("section"));
        set(page.querySelector("input"), 1);
        found.push(visible("section"), page.querySelector("output").value);"""
    title, images, width, durations, *sections, step = in_browser(run / "report.html", code)
    assert title == str(run) and images == 0 and width <= 360
    assert durations == pytest.approx([soundfile.info(folder / "train/0000.wav").duration, 32], abs=1e-3)
    assert sections == [[0, 3], [1, 4]] and step == "1"  # one slider for both prompts


def test_several_runs_in_a_browser(three_runs, show):
    """The table of settings is wider than a phone, and scrolls separately."""
    settings = three_runs[0] / "run.json"
    settings.write_text(json.dumps({"a_setting_with_a_long_name": "a long value " * 5}))
    record_code(three_runs[0], ("0" * 40, "+x" * 1_000))
    show(*three_runs)
    code = """const table = page.querySelector(".scroll");
        found.push(page.documentElement.scrollWidth <= 360, table.scrollWidth > table.clientWidth);
        found.push(all("svg").every(svg => svg.getBoundingClientRect().width > 300));"""
    assert in_browser(three_runs[-1] / "compared.html", code) == [True, True, True]


def test_the_filter_of_an_evaluation_in_a_browser(tmp_path, show, rows):
    evaluation = make_evaluation(tmp_path / "eval", rows, {0: "no", 5: "a Zebra"})
    show(evaluation)
    code = """const form = page.forms[0];
        const filters = [["result", "wrong"], ["task", "music"], ["text", "zebra"], ["text", ""]];
        for (const [name, value] of filters) {
          form.reset();
          set(form.elements[name], value);
          found.push([visible("article"), form.elements.count.value]);
        }"""
    music = [i for i, row in enumerate(rows) if row["task"] == "music"]
    expected = [[indices, f"{len(indices)} of 12 shown"] for indices in ([0, 5], music, [5], [*range(12)])]
    assert in_browser(evaluation / "report.html", code) == expected
