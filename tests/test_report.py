"""The page of a run or an evaluation: read with a parser, and in a browser where there is one."""

import base64
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import soundfile
from conftest import run_script, write

import evaluate
import report
from data import BadInput, printable
from rewards import paired_difference, wilson_interval

NASTY = {
    "script": "<script>document.title = 'run'</script>",
    "style": "</style></script><script>document.title = 'run'</script>",
    "attribute": "\"><img src=x onerror=\"document.title='run'\">'",
    "control characters": "a\x00b\x1b[31m\x07\u202ec\r\n\ud800",
    "long": "x" * 10_000,
    "references": "&lt;b&gt; &amp; &#60; ]]> <!-- {{ $x$",
}


class Page(HTMLParser):
    """The elements (name, attributes), headings and the text of a page, without scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.inside, self.headings = [], "", "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data
        if re.fullmatch("h[1-6]", self.inside):
            self.headings.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def names(self):
        return {(tag, *sorted(attributes)) for tag, attributes in self.elements}


@pytest.fixture
def show(monkeypatch):
    """The page that report.py makes of these folders."""

    def make(*words):
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, words)])
        report.main()
        *before, folder = [word for word in words if os.path.isdir(word)]
        return Page(folder / ("changed.html" if before else "report.html"))

    return make


def group(folder, step, completions, question="What beeps?", **more):
    row = {"step": step, "audio": str(folder / "train/0000.wav"), "question": question}
    row |= {"choices": ["a", "b"], "answer": "b", "completions": completions}
    return row | {"rewards": [1.0, 2.0], "advantages": [-0.7071, 0.7071]} | more


def make_run(path, folder, completions=("no", "yes"), steps=3, **more):
    path.mkdir()
    lines = [{"step": i, "loss": 0.1, "reward": 1 + i / 8, "seconds_update": 2.0} for i in range(steps)]
    write(path / "metrics.jsonl", lines)
    write(path / "samples.jsonl", [group(folder, i, list(completions), **more) for i in range(steps)])
    return path


def make_evaluation(path, folder, answers, **more):
    """Predictions for the test questions, scored: their answers, or what `answers` has by index."""
    path.mkdir()
    rows = [json.loads(line) for line in open(folder / "test.jsonl")]
    for i, row in enumerate(rows):
        said = answers.get(i, row["answer"])
        row |= {"audio": str(folder / row["audio"]), "model_output": said, "completion": f"<{said}>"} | more
    write(path / "predictions.json", rows, as_list=True)
    evaluate.score_file(str(path / "predictions.json"))
    return path


# ---------------------------------------------------------------- a run


def test_the_page_of_a_real_run(folder, tmp_path, show, capsys):
    run_script("train_grpo", folder, tmp_path / "run", samples_every=1, eval_data=str(folder / "test.jsonl"))
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"python report.py {tmp_path / 'run'}")
    page = show(tmp_path / "run")
    assert "2 of 2 steps, finished" in page.text and "prompts_per_step" in page.text
    assert page.headings[1:3] == ["Curves", "Groups"] and page.headings[-1] == "Settings"
    rows = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl", encoding="utf-8")]
    assert [s["data-step"] for s in page.all("section")] == ["0", "1", "2"] * 4  # of each of four prompts
    assert all(printable(o) in page.text for row in rows for o in row["completions"])
    players = page.all("audio")
    assert len(players) == len(page.all("input")) == 4 and all(
        slider["max"] == "2" for slider in page.all("input")
    )
    for player, row in zip(players, rows):
        clip = base64.b64decode(player["src"].removeprefix("data:audio/wav;base64,"))
        assert clip == open(row["audio"], "rb").read()
        assert player["aria-label"] == f"clip of {soundfile.info(row['audio']).duration:.1f} s"
    titles = [svg["aria-label"].split(":")[0] for svg in page.all("svg")]
    assert titles == [title for title in report.PANELS if title != "loss"] + ["loss", "seconds of a step"]


@pytest.mark.parametrize("nasty", NASTY.values(), ids=NASTY)
def test_whatever_a_model_or_the_data_says_is_text(folder, tmp_path, show, nasty):
    plain = show(make_run(tmp_path / "plain", folder))
    page = show(make_run(tmp_path / "run", folder, [nasty, "yes"], question=nasty, choices=[nasty, "b"]))
    assert page.names() == plain.names()
    assert len(page.all("script")) == 1 and page.text.count(printable(nasty)) == 3 * 1 + 2
    plain = show(make_evaluation(tmp_path / "one", folder, {}))
    page = show(make_evaluation(tmp_path / "two", folder, {}, task=nasty, completion=nasty, question=nasty))
    assert page.names() <= plain.names() and page.text.count(printable(nasty)) >= 2 * 12 + 1
    pair = show(tmp_path / "one", make_evaluation(tmp_path / "three", folder, {0: nasty}))
    assert pair.names() <= plain.names() and pair.text.count(f"<{printable(nasty)}>") == 1


def test_only_the_pages_own_script_may_run_and_nothing_is_loaded(folder, tmp_path, show):
    page = show(make_run(tmp_path / "run", folder))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy and re.search(r"script-src 'sha256-[\w+/]+=*';", policy)
    links = [
        value
        for _, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href")
    ]
    assert all(re.match("data:audio/|#", link) for link in links)
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)


def test_colour_and_number_tell_the_advantage(folder, tmp_path, show):
    run = make_run(tmp_path / "run", folder, steps=1, advantages=[-0.5, 1.5], rewards=[0.0, 2.0])
    page = show(run)
    colours = [row["style"] for row in page.all("tr") if "style" in row]
    assert colours == ["background: rgb(230 110 20 / 0.10)", "background: rgb(30 120 230 / 0.30)"]
    assert "-0.50no" in page.text and "+1.50yes" in page.text


def test_a_run_that_is_going_has_no_settings_yet_and_maybe_half_a_line(folder, tmp_path, show):
    run = make_run(tmp_path / "run", folder, steps=1)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 1, "l')
    page = show(run)
    assert "1 of unknown steps, not finished" in page.text and "with the first checkpoint" in page.text
    (run / "metrics.jsonl").unlink()  # in its very first step
    assert "0 of unknown steps" in show(run).text and len(show(run).all("svg")) == 0


def test_sft_has_curves_and_no_groups(folder, tmp_path, show):
    run_script("train_sft", folder, tmp_path / "run")
    page = show(tmp_path / "run")
    assert "Groups" not in page.headings and [svg["aria-label"].split(":")[0] for svg in page.all("svg")] == [
        "loss",
        "seconds of a step",
    ]


def test_what_is_too_long_is_left_out_and_that_is_said(folder, tmp_path, show, monkeypatch):
    monkeypatch.setattr(report, "MOST", 4)
    page = show(make_run(tmp_path / "run", folder, steps=9))
    assert [s["data-step"] for s in page.all("section")] == ["2", "5", "8"] and "3 of 9 steps" in page.text
    page = show(make_evaluation(tmp_path / "eval", folder, {3: "no", 8: "no"}))
    assert [a["data-result"] for a in page.all("article")] == ["right", "right", "wrong", "wrong"]
    assert "4 of 12 are on this page" in page.text


def test_long_clips_are_linked_where_they_lie(folder, tmp_path, show, monkeypatch):
    clip = tmp_path / "a #1 %.wav"
    shutil.copy(folder / "train/0000.wav", clip)
    monkeypatch.setattr(report, "CLIP_BYTES", clip.stat().st_size - 1)
    page = show(make_run(tmp_path / "run", folder, audio=str(clip)))
    (player,) = page.all("audio")
    assert (tmp_path / "run" / unquote(player["src"])).samefile(clip) and "#" not in player["src"]
    clip.unlink()
    page = show(tmp_path / "run")
    assert not page.all("audio") and "no such audio file" in page.text


def test_the_same_run_gives_the_same_page(folder, tmp_path, show):
    run = make_run(tmp_path / "run", folder)
    show(run)
    first = (run / "report.html").read_bytes()
    show(run)
    assert (run / "report.html").read_bytes() == first


def test_means_of_many_steps():
    assert report.means([{"step": i, "x": i} for i in range(79)], "x") == [(i, i) for i in range(79)]
    assert report.means([{"step": i, "x": i} for i in range(400)], "x")[:2] == [(9, 4.5), (19, 14.5)]


def test_the_picture_draws_what_the_run_wrote(tmp_path, show):
    lines = [{"step": step, "reward_accuracy": 0.5, "kl": 0.12 * step / 19} for step in range(20)]
    lines[0]["eval_accuracy"], lines[19]["eval_accuracy"] = 0.25, 1.0
    lines.append({"step": 20, "eval_accuracy": 0.9})
    left, right = report.draw_picture(lines, str(tmp_path / "curves.svg")).axes
    (held_out, sampled), (kl,) = left.lines, right.lines
    assert held_out.get_xydata().tolist() == [[0, 0.25], [19, 1.0], [20, 0.9]]
    assert sampled.get_xydata().tolist() == [[i, 0.5] for i in range(20)]
    assert kl.get_ydata() == pytest.approx([line["kl"] for line in lines[:20]])
    assert ElementTree.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "metrics.jsonl", lines)
    show(tmp_path / "run", "--picture", tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "curves.svg").read_bytes()


# ---------------------------------------------------------------- evaluations


def test_the_page_of_an_evaluation(folder, tmp_path, show):
    page = show(make_evaluation(tmp_path / "eval", folder, {0: "no", 5: "no"}))
    low, high = wilson_interval(10, 12)
    assert f"overall83.3%{low:.1%} to {high:.1%}10 of 12" in page.text
    results = [item["data-result"] for item in page.all("article")]
    assert results == ["wrong" if i in (0, 5) else "right" for i in range(12)]
    assert {item["data-task"] for item in page.all("article")} == {"sound", "music", "speech"}
    assert [select["name"] for select in page.all("select")] == ["result", "task"]
    assert page.text.count("(the answer)") == len(page.all("audio")) == 12 and "wrong: <no>" in page.text


def test_an_evaluation_knows_where_its_clips_are(folder, tmp_path, show, monkeypatch):
    (tmp_path / "questions.jsonl").write_bytes((folder / "test.jsonl").read_bytes())
    flags = f"--model {folder}/model --data {tmp_path}/questions.jsonl --audio_dir {folder}"
    flags += f" --output {tmp_path}/eval --limit 2 --max_new_tokens 2"
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags.split()])
    evaluate.main()
    assert len(show(tmp_path / "eval").all("audio")) == 2


def test_without_answers_there_is_no_accuracy(folder, tmp_path, show):
    page = show(make_evaluation(tmp_path / "eval", folder, {}, answer=None))
    assert "no answers to compare with" in page.text
    assert {item["data-result"] for item in page.all("article")} == {"not scored"}


def test_rows_that_cannot_be_read_are_there_with_their_reason(folder, tmp_path, show):
    """Of any model's predictions, scored by --score: one without a clip is scored and shown nevertheless."""
    evaluation = make_evaluation(tmp_path / "eval", folder, {})
    rows = json.loads((evaluation / "predictions.json").read_text())
    del rows[0]["audio"]
    rows[1]["audio"] = "nowhere.wav"
    write(evaluation / "predictions.json", rows, as_list=True)
    with pytest.raises(BadInput, match=r"no results.json of these predictions; python evaluate.py --score"):
        show(evaluation)
    evaluate.score_file(str(evaluation / "predictions.json"))
    page = show(evaluation)
    assert "row 1: no audio" in page.text and "nowhere.wav: no such audio file" in page.text
    assert page.headings.count(rows[0]["question"]) >= 1 and len(page.all("audio")) == 10
    assert {item["data-result"] for item in page.all("article")} == {"right"}


def test_of_two_evaluations_what_changed(folder, tmp_path, show):
    first = make_evaluation(tmp_path / "a", folder, {0: "no", 1: "no", 2: "no"})
    second = make_evaluation(tmp_path / "b", folder, {2: "nope", 3: "no"})
    page = show(first, second)
    kinds = [item["data-result"] for item in page.all("article")]
    assert kinds == ["now right", "now right", "another answer", "now wrong"]
    d, low, high, p = paired_difference([(i > 2, i not in (2, 3)) for i in range(12)])
    assert f"difference{d:+.1%} ({low:+.1%} to {high:+.1%}), McNemar p {p:.2g}" in page.text
    assert "first, wrong: <no>" in page.text and "second, wrong: <nope>" in page.text
    assert "correct910" in page.text  # the settings of both, side by side
    (second / "predictions.json").write_text(
        json.dumps(json.loads((second / "predictions.json").read_text())[1:])
    )
    with pytest.raises(BadInput, match="the questions are not those of"):
        show(first, second)


@pytest.mark.parametrize("files", [{}, {".lock": ""}, {"metrics.jsonl": "", "answers-0.jsonl": ""}], ids=str)
def test_no_run_is_said_in_one_line(tmp_path, show, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=f"^{tmp_path}: neither a run"):
        show(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(files)


def test_damaged_samples_are_said_in_one_line(folder, tmp_path, show):
    run = make_run(tmp_path / "run", folder, choices=3)
    with pytest.raises(BadInput) as error:
        show(run)
    assert str(error.value).startswith(f"{run}: ") and "\n" not in str(error.value)
    assert not (run / "report.html").exists()


# ---------------------------------------------------------------- in a browser


class Browser:
    """Chromium, headless; its DevTools protocol goes over a pipe, so that no package is needed."""

    def __init__(self, program, profile):
        theirs, self.output = os.pipe()
        self.input, back = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs, back)]
        flags = f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile}"
        command = f"exec {program} {flags} about:blank 3<&{high[0]} 4>&{high[1]}"
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=high, stderr=subprocess.DEVNULL)
        for fd in (theirs, back, *high):
            os.close(fd)
        self.events, self.session, self.buffer, self.n = [], {}, b"", 0
        (page,) = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.buffer:
            assert select.select([self.input], [], [], 60)[0], "the browser does not answer"
            part = os.read(self.input, 1 << 20)
            assert part, "the browser has ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def __call__(self, method, **params):
        self.n += 1
        message = {"id": self.n, "method": method, "params": params} | self.session
        os.write(self.output, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.n:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path):
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in [event["method"] for event in self.events]:
            self.events.append(self.receive())

    def js(self, code):
        answer = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def requests(self):
        sent = [
            e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith("data:")]

    def complaints(self):
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.events if event["method"] in kinds]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no browser here: apt-get install chromium")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.terminate()
    browser.process.wait()


DURATIONS = """Promise.all([...document.querySelectorAll("audio")].map(clip => new Promise(done => {
    clip.onloadedmetadata = () => done(clip.duration); clip.onerror = () => done(-1); clip.load() })))"""


def test_a_run_in_a_browser(folder, tmp_path, show, browser, monkeypatch):
    for nasty in NASTY.values():
        more = f"{nasty} other"
        run = make_run(tmp_path / f"{len(os.listdir(tmp_path))}", folder, [nasty, more], question=nasty)
        show(run)
        browser.open(run / "report.html")
        assert browser.js("document.title") == str(run) and browser.js("document.images.length") == 0
        assert browser.requests() == [(run / "report.html").as_uri()] and not browser.complaints()
    length = soundfile.info(folder / "train/0000.wav").duration
    assert browser.js(DURATIONS) == [pytest.approx(length, abs=1e-3)]

    shown = (
        "[...document.querySelectorAll('section')].filter(e => e.checkVisibility()).map(e => e.dataset.step)"
    )
    assert browser.js(shown) == ["0"]
    browser.js("document.querySelector('input').focus()")
    for kind in ("keyDown", "keyUp"):
        browser(
            "Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39
        )
    assert browser.js(shown) == ["1"] and browser.js("document.querySelector('output').value") == "1"
    for width in (360, 1200):
        browser(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True
        )
        assert browser.js("document.documentElement.scrollWidth") <= width

    monkeypatch.setattr(report, "CLIP_BYTES", 0)  # a clip beside the page is found and played, too
    show(run)
    browser.open(run / "report.html")
    assert browser.js(DURATIONS) == [pytest.approx(length, abs=1e-3)] and not browser.complaints()


def test_an_evaluation_in_a_browser(folder, tmp_path, show, browser):
    evaluation = make_evaluation(tmp_path / "eval", folder, {0: "no", 5: "a Zebra"})
    show(evaluation)
    browser.open(evaluation / "report.html")
    rows = [json.loads(line) for line in open(folder / "test.jsonl")]
    lengths = [soundfile.info(folder / row["audio"]).duration for row in rows]
    assert browser.js(DURATIONS) == pytest.approx(lengths, abs=1e-3)

    def shown(name, value):
        browser.js(f"document.forms[0].reset(); document.forms[0].elements[{name!r}].value = {value!r}")
        browser.js("document.forms[0].elements.text.dispatchEvent(new Event('input', {bubbles: true}))")
        visible = "[...document.querySelectorAll('article')].map((e, i) => e.checkVisibility() ? i : -1)"
        found = [i for i in browser.js(visible) if i >= 0]
        assert browser.js("document.querySelector('output').value") == f"{len(found)} of 12 shown"
        return found

    assert shown("result", "wrong") == [0, 5] and shown("result", "") == list(range(12))
    assert shown("task", "music") == [i for i, row in enumerate(rows) if row["task"] == "music"]
    assert shown("text", "zebra") == [5]
    assert browser.requests() == [(evaluation / "report.html").as_uri()] and not browser.complaints()
