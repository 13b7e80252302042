"""Bad input is refused in one line that says what is wrong and where; evaluations count a bad row as wrong.

Each table maps a name to how to make the input and a regular expression that the message must match.
The tests that use a table are below it.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import CONVERTED, NOISE, NOISE_THEN_SILENCE, OWN, ROOT, mp3, run_script, without_length, write
from safetensors.torch import load_file, save_file

import train_grpo
from checkpoints import merge
from cli import BadInput, located, parse, run_main, say
from data import load_examples
from model import load_model
from tools import prepare_data

# ---------------------------------------------------------------- questions

TONE = (0.5 * np.sin(np.arange(16_000) / 10)).astype(np.float32)


def row(base=OWN, without="", **changes):
    """A row with some changes, about the good clip a.wav."""
    changed = base | changes
    changed.pop(without, None)
    return lambda folder: changed


def clip(name, content):
    """A good row about a clip with these bytes."""

    def make(folder):
        (folder / name).write_bytes(content)
        return OWN | {"audio": name}

    return make


def wav(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def ogg(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="OGG", subtype="VORBIS")
    return file.getvalue()


BAD_QUESTIONS = {
    "not an object": (lambda folder: ["a"], "not a JSON object"),
    "no question": (row(question=" "), r"no question \(key 'question'\)"),
    "question is a number": (row(question=3), r"no question \(key 'question'\)"),
    "no AVQA question": (row(CONVERTED, without="question_text"), r"no question \(key 'question_text'\)"),
    "no options": (row(without="choices"), r"no list of at least two options \(key 'choices'\)"),
    "no AVQA options": (
        row(CONVERTED, without="multi_choice"),
        r"at least two options \(key 'multi_choice'\)",
    ),
    "one option": (row(choices=["cat"]), "at least two options"),
    "options as text": (row(choices="dog, cat"), "at least two options"),
    "empty option": (row(choices=["cat", ""]), "option 2 is not text: ''"),
    "option is null": (row(CONVERTED, multi_choice=[None, "cat"]), "option 1 is not text: None"),
    "option is nan": (row(choices=[float("nan"), "cat"]), "option 1 is not text: nan"),
    "invisible character in an option": (row(choices=["a\u200bdog", "cat"]), r"invisible character U\+200B"),
    "option is a list": (row(choices=[["dog"], "cat"]), r"option 1 is not text: \['dog'\]"),
    "index too large": (row(CONVERTED, answer=2), "answer must be an index from 0 to 1, not 2"),
    "index is negative": (row(CONVERTED, answer=-1), "answer must be an index from 0 to 1, not -1"),
    "index is text": (row(CONVERTED, answer="cat"), "answer must be an index from 0 to 1, not 'cat'"),
    "special token": (row(question="What is <|AUDIO|>?"), r"special token <\|AUDIO\|>"),
    "special token in a thought": (row(thought="hm<|im_end|>"), r"special token <\|im_end\|>"),
    "half a character": (row(question="What \ud83d?"), "UnicodeEncodeError"),
    "long question": (row(question="What? " * 5000), r"the question has \d+ tokens; the limit is 4096"),
    "no audio": (row(without="audio"), "no audio"),
    "audio is a number": (row(audio=3), "no audio"),
    "missing clip": (row(audio="gone.wav"), "no (such )?audio file"),
    "NUL in the name of a clip": (row(audio="a\0.wav"), "no (such )?audio file"),
    "name of a clip is not UTF-8": (row(audio="a\udcff.wav"), "no (such )?audio file|UnicodeEncodeError"),
    "clip is a folder": (row(audio="."), "no (such )?audio file"),
    "clip is text": (clip("text.wav", b"not a sound"), "text.wav: cannot be read as audio"),
    "clip is headerless": (clip("text.raw", b"not a sound"), "text.raw: "),
    "clip has no bytes": (clip("zero.wav", b""), "zero.wav: cannot be read as audio"),
    "clip has no samples": (clip("empty.wav", wav(TONE[:0])), "empty.wav: is empty"),
    "clip is cut short": (clip("cut.wav", wav(TONE)[:32_000]), "cut.wav: is cut short"),
    "clip ends in half a page": (clip("half.ogg", ogg(NOISE)[:-500]), "half.ogg: is cut short"),
    "half of an MP3": (clip("half.mp3", mp3(NOISE)[: len(mp3(NOISE)) // 2]), "half.mp3: is cut short"),
    "MP3 of unknown length": (
        clip("unknown.mp3", without_length(mp3(NOISE_THEN_SILENCE))),
        r"unknown.mp3: only its first [\d.]+ s can be decoded",
    ),
    "clip has nan": (clip("nan.wav", wav(np.where(TONE > 0.4, np.nan, TONE))), "nan.wav: has samples .* nan"),
}
BAD_FOR_TRAINING = {  # an evaluation accepts these, see test_data.py
    "answer is not an option": (
        row(answer="bird"),
        r"answer 'bird' is not among the options \['dog', 'cat'\]",
    ),
    "no answer": (row(without="answer"), "has no answer"),
    "empty answer": (row(answer=""), "has no answer"),
    "answer is nan": (row(answer=float("nan")), "has no answer"),
    "no AVQA answer": (row(CONVERTED, answer=None), "has no answer"),
}


@pytest.fixture
def with_clip(tmp_path):
    """A folder with one good clip."""
    (tmp_path / "a.wav").write_bytes(wav(TONE))
    return tmp_path


@pytest.mark.parametrize("make, message", (ALL := BAD_QUESTIONS | BAD_FOR_TRAINING).values(), ids=ALL)
def test_training_refuses_a_bad_question(folder, with_clip, make, message):
    path = write(with_clip / "rows.jsonl", [OWN, make(with_clip), OWN])
    with pytest.raises(BadInput) as error:
        run_script("train_sft", folder, with_clip / "run", data=path, prompts_per_step=3, max_steps=1)
    assert re.match(f"{path}:2: .*({message})", str(error.value))
    assert "\n" not in str(error.value)
    assert not (with_clip / "run" / "config.json").exists()


@pytest.fixture
def all_bad(with_clip):
    """A file of all bad questions, each after a good one; and the messages by line number."""
    rows = []
    messages = {}
    for make, message in BAD_QUESTIONS.values():
        rows += [OWN, make(with_clip)]
        messages[len(rows)] = message
    return write(with_clip / "rows.jsonl", rows), messages


def test_an_evaluation_counts_bad_questions_as_wrong(folder, all_bad, run_evaluate, capsys):
    path, messages = all_bad
    output = os.path.join(os.path.dirname(path), "eval")
    flags = ["--model", folder / "model", "--max_new_tokens", 4, "--output", output]
    run_evaluate(*flags, "--data", path)
    results = json.load(open(f"{output}/results.json"))
    assert results["total"] == 2 * len(messages)
    assert len(results["unreadable"]) == len(messages)
    for (line, message), problem in zip(messages.items(), results["unreadable"]):
        assert re.match(f"{path}:{line}: .*({message})", problem)
        assert "\n" not in problem

    predictions = json.load(open(f"{output}/predictions.json"))
    completions = [row["completion"] for row in predictions]
    assert set(completions[1::2]) == {""}
    assert len(set(completions[::2])) == 1 and completions[0]  # the good rows are all the same question

    out = capsys.readouterr().out
    assert f"{len(messages)} rows or clips could not be read and count as wrong" in out
    assert f"{path}:2: not a JSON object" in out


def test_check_reports_all_bad_questions(folder, all_bad, capsys):
    path, messages = all_bad
    with pytest.raises(SystemExit) as status:
        prepare_data.check(path, model=str(folder / "model"), decode=True)
    assert status.value.code == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unusable: ")]
    assert len(problems) == len(messages)
    for (line, message), problem in zip(messages.items(), problems):
        assert re.match(f"unusable: {path}:{line}: .*({message})", problem)


# ---------------------------------------------------------------- files of questions

GOOD = json.dumps(OWN).encode()
BAD_FILES = {  # bytes of the file; None: there is no file
    "missing": (None, "rows: FileNotFoundError"),
    "not UTF-8": (b"\xff\xfe\x00", "rows: UnicodeDecodeError"),
    "empty": (b"\n\n", "rows: contains no rows"),
    "empty list": (b"[]", "rows: contains no rows"),
    "line is not JSON": (GOOD + b"\n{'a': 1}\n", "rows:2: not JSON .*: JSONDecodeError"),
    "list is not JSON": (b"[\n1,\n", "rows: not a JSON list: JSONDecodeError: .* line 3"),
    "number of 5,000 digits": (GOOD + b"\n" + b"9" * 5000, "rows:2: not JSON .*: ValueError"),
    "100,000 brackets": (GOOD + b'\n{"a": ' + b"[" * 100_000, "rows:2: not JSON .*: RecursionError"),
    "no usable row": (b"3\n4\n", "rows:1: not a JSON object"),
}


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_of_questions_is_refused(folder, tmp_path, run_evaluate, content, message):
    path = str(tmp_path / "rows")
    if content is not None:
        (tmp_path / "rows").write_bytes(content)
    consumers = [
        lambda: run_script("train_sft", folder, tmp_path / "run", data=path),
        lambda: run_evaluate("--model", folder / "model", "--data", path, "--output", tmp_path / "eval"),
        lambda: load_examples(path, for_training=False),
    ]
    for consumer in consumers:
        with pytest.raises(BadInput, match=message) as error:
            consumer()
        assert "\n" not in str(error.value)
    assert set(os.listdir(tmp_path)) <= {"rows"}


# ---------------------------------------------------------------- models


def change_weights(change, file="model.safetensors"):
    """Apply `change` to the dict of tensors in a model file, in place."""

    def harm(folder):
        weights = load_file(folder / file)
        change(weights)
        save_file(weights, folder / file, {"format": "pt"})

    return harm


def change_json(name, **values):
    def harm(folder):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | values))

    return harm


def remove(name):
    return lambda folder: (folder / name).unlink()


def write_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def layer_of(weights):
    """The name of a layer in the file; transformers may use another."""
    (name,) = [name for name in weights if name.endswith("layers.1.mlp.up_proj.weight")]
    return name


def drop_layer(weights):
    del weights[layer_of(weights)]


def shorten_layer(weights):
    weights[layer_of(weights)] = weights[layer_of(weights)][:10].clone()


def add_nan(weights):
    weights[layer_of(weights)][3, 4] = torch.nan


def add_negative_infinity(weights):
    weights[layer_of(weights)][-1, -1] = -torch.inf


def add_layer(weights):
    weights["more"] = torch.ones(1)


LAYER = "model.language_model.layers.1.mlp.up_proj.weight"
OWN_CODE = {"AutoConfig": "evil.Config"}
BAD_MODELS = {
    "a layer is missing": (change_weights(drop_layer), f"1 missing keys, first {LAYER}"),
    "a layer too many": (change_weights(add_layer), "1 unexpected keys, first more"),
    "another shape": (change_weights(shorten_layer), "RuntimeError|1 mismatched keys"),
    "nan": (change_weights(add_nan), f"{LAYER} has values that are nan or inf"),
    "-inf": (change_weights(add_negative_infinity), f"{LAYER} has values that are nan or inf"),
    "truncated weights": (lambda folder: os.truncate(folder / "model.safetensors", 1000), "Error: "),
    "no weights": (remove("model.safetensors"), "OSError: "),
    "no tokenizer": (remove("tokenizer.json"), r"the tokenizer \(\d+ tokens\) cannot round-trip text"),
    "another placeholder": (change_json("config.json", audio_token_id=7), "the audio placeholder is token"),
    "another kind": (change_json("config.json", model_type="qwen2"), "is a qwen2 model; supported: "),
    "code of its own": (change_json("config.json", model_type="mine", auto_map=OWN_CODE), "is a mine model"),
    "no configuration": (remove("config.json"), "no config.json was found"),
    "configuration is a list": (write_file("config.json", b"[]"), "no config.json was found"),
}


@pytest.mark.parametrize("harm, message", BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_bad_model_is_refused(folder, tmp_path, harm, message):
    shutil.copytree(folder / "model", tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(BadInput) as error:
        load_model(str(tmp_path / "model"))
    assert re.match(f"{tmp_path}/model: .*({message})", str(error.value))
    assert "\n" not in str(error.value)


def test_nothing_is_written_for_a_bad_model(folder, tmp_path, run_evaluate):
    shutil.copytree(folder / "model", tmp_path / "model")
    change_weights(add_nan)(tmp_path / "model")
    output = tmp_path / "output"
    with pytest.raises(BadInput, match="nan or inf"):
        run_script("train_grpo", folder, output, model=str(tmp_path / "model"))
    with pytest.raises(BadInput, match="nan or inf"):
        run_evaluate("--model", tmp_path / "model", "--data", folder / "test.jsonl", "--output", output)
    assert os.listdir(output) == [".lock"]


def test_code_of_a_model_never_runs(folder, tmp_path):
    """Even if the answer to every prompt is yes."""
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    auto_map = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer")}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        change_json(name, auto_map=auto_map)(model)
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    command = [sys.executable, ROOT / "evaluate.py", "--model", model, "--max_new_tokens", "4"]
    command += ["--ask", folder / "test" / "0000.wav", "--question", "What?", "--choices", "dog", "cat"]
    done = subprocess.run(command, input="y\n" * 99, capture_output=True, text=True)
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("lora") / "run"
    run_script("train_sft", folder, output, lora_rank=2, max_steps=1)
    return output


def rename_adapters(weights):
    for name in list(weights):
        weights[name.replace("layers.1", "layers.7")] = weights.pop(name)


def drop_adapter(weights):
    weights.popitem()


def fill_adapter_with_nan(weights):
    next(iter(weights.values())).fill_(torch.nan)


ADAPTERS = "adapter_model.safetensors"
BAD_ADAPTERS = {
    "of another base": (change_weights(rename_adapters, ADAPTERS), r"run: \d+ adapters do not fit the base"),
    "one is missing": (change_weights(drop_adapter, ADAPTERS), "run: 1 adapters do not fit the base, first "),
    "nan": (change_weights(fill_adapter_with_nan, ADAPTERS), "run: .* has values that are nan or inf"),
    "not safetensors": (write_file(ADAPTERS, b"damaged"), "run: SafetensorError"),
    "no base": (write_file("adapter_config.json", b"{}"), "run/adapter_config.json: KeyError"),
    "base is gone": (change_json("adapter_config.json", base_model_name_or_path="./gone"), "./gone: "),
}


@pytest.mark.parametrize("harm, message", BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_bad_adapters_are_refused(lora, tmp_path, harm, message):
    shutil.copytree(lora, tmp_path / "run")
    load_model(str(tmp_path / "run"))
    harm(tmp_path / "run")
    for consumer in (load_model, lambda path: merge(path, output=str(tmp_path / "merged"))):
        with pytest.raises(BadInput, match=message) as error:
            consumer(str(tmp_path / "run"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "merged").exists()


# ---------------------------------------------------------------- errors, flags and the terminal


@pytest.mark.parametrize(
    "error, message",
    [
        (ValueError("first line\nsecond line"), "rows:1: ValueError: first line"),
        (ValueError(), "rows:1: ValueError"),
        (BadInput("no question"), "rows:1: no question"),
    ],
    ids=["two lines", "no text", "BadInput"],
)
def test_any_error_becomes_one_line_with_its_location(error, message):
    with pytest.raises(BadInput) as located_error:
        with located("rows:1"):
            raise error
    assert str(located_error.value) == message


@pytest.mark.parametrize("flag", ["--lr=nan", "--beta=inf", "--temperature=-inf", "--lora_alpha=nan"])
def test_numbers_must_be_finite(flag):
    name, value = flag.split("=")
    with pytest.raises(BadInput, match=f"^{name} must be a finite number, not {value}$"):
        parse(train_grpo.Config, "", [flag])


@pytest.mark.parametrize(
    "error, message",
    [
        (BadInput("rows:1: no question \x1b[31m"), "error: rows:1: no question \\x1b[31m"),
        (OSError("a name\nwith two lines"), "error: a name\\nwith two lines"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "error: the GPU is out of memory (CUDA out of"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_script_ends_with_one_line(error, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as status:
        run_main(main)
    text = status.value.code
    assert text.startswith(message)
    assert "\n" not in text


def test_printed_text_cannot_steer_the_terminal(capsys):
    say("red \x1b[31m, bell \a, back \x9b, right to left \u202e, é 犬 😀\nsecond\tline")
    out = capsys.readouterr().out
    assert out == "red \\x1b[31m, bell \\x07, back \\x9b, right to left \\u202e, é 犬 😀\nsecond\tline\n"


def test_a_terminal_may_lack_characters_of_the_data(tmp_path):
    row = {"choices": ["dog", "cat"], "answer": "dog", "model_output": "dog", "task": "é犬"}
    write(tmp_path / "rows.jsonl", [row])
    command = [sys.executable, ROOT / "evaluate.py", "--score", "rows.jsonl"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "  \\xe9\\u72ac  " in done.stdout
