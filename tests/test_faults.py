"""Nothing fails in silence: bad models, rows, clips, flags, folders are refused in one line; stops save."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, as_flags, assert_same_run, config, inputs_of, launch, load_examples, metrics
from conftest import run_script, training_code, write
from safetensors.torch import load_file, save_file

import data
import evaluate
import prepare_data
import train_grpo
import training
from checkpoints import list_states, merge
from data import BadInput, load_audio, printable
from flags import parse, say
from model import NotFinite, embed_prompt, load_model, sample

# ---------------------------------------------------------------- models


def change_weights(change):
    def harm(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return harm


def change_json(name, **values):
    def harm(folder):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | values))

    return harm


def fill_with_nan(weights):
    weights[layer_of(weights)][3, 4] = torch.nan


def layer_of(weights):
    """A layer as the file calls it, which transformers may call otherwise."""
    (name,) = [name for name in weights if name.endswith("layers.1.mlp.up_proj.weight")]
    return name


def shorten(weights):
    weights[layer_of(weights)] = weights[layer_of(weights)][:10].clone()


LOADED = "model.language_model.layers.1.mlp.up_proj.weight"
BAD_MODELS = {
    "a layer is missing": (change_weights(lambda w: w.pop(layer_of(w))), f"1 missing keys, first {LOADED}"),
    "a weight too many": (
        change_weights(lambda w: w.update(more=torch.ones(1))),
        "1 unexpected keys, first more",
    ),
    "another shape": (change_weights(shorten), "cannot load"),
    "not a number": (
        change_weights(fill_with_nan),
        f"{LOADED} has values that are not finite",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokens, cannot spell"),
    "another placeholder": (change_json("config.json", audio_token_id=7), "the audio placeholder is token"),
    "code of its own": (
        change_json("config.json", model_type="mine", auto_map={"AutoConfig": "evil.Config"}),
        "cannot load the model",
    ),
    "no configuration": (lambda folder: (folder / "config.json").write_text("[]"), "cannot load the model"),
}


@pytest.mark.parametrize("harm, says", BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_model_is_exactly_what_was_saved_or_refused(folder, tmp_path, harm, says):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_model(str(tmp_path / "model"))
    harm(tmp_path / "model")
    with pytest.raises(BadInput) as error:
        load_model(str(tmp_path / "model"))
    assert str(error.value).startswith(f"{tmp_path}/model: ") and says in str(error.value)
    assert "\n" not in str(error.value)


def test_no_code_of_a_model_runs(folder, tmp_path):
    """Neither asked for on the terminal, nor when something there says yes."""
    shutil.copytree(folder / "model", tmp_path / "model")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        mapped = {key: "evil.Evil" for key in ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer")}
        change_json(name, auto_map=mapped)(tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    ask = "--ask a --question b --choices c d --limit 1".split()
    command = [sys.executable, ROOT / "evaluate.py", "--model", tmp_path / "model", *ask]
    command[-8] = folder / "test" / "0000.wav"
    done = subprocess.run(command, input="y\n" * 99, capture_output=True, text=True)
    assert not (tmp_path / "ran").exists() and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("lora") / "run"
    run_script("train_sft", folder, output, lora_rank=2, max_steps=1)
    return output


def rename_adapters(weights):
    for name in list(weights):
        weights[name.replace("layers.1", "layers.7")] = weights.pop(name)


BAD_ADAPTERS = {
    "names of another base": (rename_adapters, "adapters do not fit the base, first base_model"),
    "some are missing": (lambda w: w.pop(next(iter(w))), "1 adapters do not fit the base"),
    "not a number": (lambda w: next(iter(w.values())).fill_(torch.nan), "not finite"),
}


@pytest.mark.parametrize("change, says", BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_adapters_fit_or_are_refused(lora, tmp_path, change, says):
    shutil.copytree(lora, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "run" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=f"run: .*{says}"):
        load_model(str(tmp_path / "run"))
    with pytest.raises(BadInput, match=says):
        merge(str(tmp_path / "run"), output=str(tmp_path / "merged"))


def test_placeholders_and_audio_must_be_as_many(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:2])
    place = (inputs["input_ids"][0] == model.config.audio_token_id).nonzero()[0]
    inputs["input_ids"][0, place] = 7
    with pytest.raises(BadInput, match="audio placeholders for"):
        embed_prompt(model, inputs)


def test_logits_that_are_not_finite_name_their_example(folder, tmp_path, toy_model, examples, monkeypatch):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[4:7])
    inputs["input_features"][1] = torch.nan
    for noise in (None, torch.rand(3, 2, 4)):
        with pytest.raises(NotFinite) as error:
            sample(model, inputs, [0], 4, 1.0, noise)
        assert error.value.args == (1,)

    def broken(*args):
        raise NotFinite(2)

    for module in ("training", "evaluate"):
        monkeypatch.setattr(f"{module}.sample", broken)
    first = examples[data.stream_indices(24, 42, 2, 1)[0]].location
    with pytest.raises(BadInput, match=f"{first}: the model's logits are not finite"):
        run_script("train_grpo", folder, tmp_path / "run")
    with pytest.raises(BadInput, match=f"{examples[2].location}: the model's logits are not finite"):
        evaluate.predict(model, processor, evaluate.prepare(processor, examples[:3], "answer"), 4)


# ---------------------------------------------------------------- rows, clips, flags

OWN = {"audio": "a.wav", "question": "What is it?", "choices": ["dog", "cat"], "answer": "cat"}
LINE = json.dumps(OWN)
BAD_LINES = {  # a line, what is said of it, and whether that is said of the row alone
    "a number of 5,000 digits": (LINE.replace('"cat"}', "9" * 5000 + "}"), "not JSON", False),
    "100,000 brackets": (LINE.replace('"cat"}', "[" * 100_000), "not JSON", False),
    "half a character": (LINE.replace("What", "\\ud83d"), "UnicodeEncodeError", True),
    "a name with a NUL": (LINE.replace("a.wav", "a\\u0000.wav"), "no such audio file", True),
    "a name that is no UTF-8": (LINE.replace("a.wav", "a\\udcff.wav"), "no such audio file", True),
    "a long question": (LINE.replace("What", "What " * 5000), "tokens, and 4096 are the most", True),
    "an option that is a list": (LINE.replace('"dog"', '["dog"]'), "option 1 is not text", True),
    "a question that is a number": (LINE.replace('"What is it?"', "3"), "no question", True),
}


@pytest.fixture
def questions(tmp_path):
    """Writes three rows, of which the second is bad, with a clip."""
    tone = 0.5 * np.sin(np.arange(16_000) / 10)
    soundfile.write(tmp_path / "a.wav", tone, 16_000)

    def write(line):
        (tmp_path / "rows.jsonl").write_text("\n".join([LINE, line, LINE]) + "\n")
        return str(tmp_path / "rows.jsonl")

    return write


@pytest.mark.parametrize("line, says, is_the_rows", BAD_LINES.values(), ids=BAD_LINES)
def test_what_is_wrong_with_a_row_is_said_of_that_row(
    folder, tmp_path, questions, capsys, line, says, is_the_rows
):
    path = questions(line)
    with pytest.raises(BadInput, match=f"rows.jsonl:2: .*{says}|rows.jsonl:2: no audio file") as error:
        run_script("train_grpo", folder, tmp_path / "run", data=path, prompts_per_step=3, max_steps=1)
    assert "\n" not in str(error.value)
    if not is_the_rows:
        return
    with pytest.raises(SystemExit):
        prepare_data.check(path, model=str(folder / "model"))
    out = capsys.readouterr().out
    assert "3 rows, 1 of them unusable" in out and f"unusable: {path}:2: " in out and says in out


@pytest.mark.parametrize("line, says, is_the_rows", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_row_costs_an_evaluation_one_row(
    folder, tmp_path, questions, monkeypatch, line, says, is_the_rows
):
    flags = ["--model", folder / "model", "--data", questions(line), "--output", tmp_path / "eval"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--max_new_tokens", "4"])
    if not is_the_rows:
        with pytest.raises(BadInput, match=f"rows.jsonl:2: {says}"):
            evaluate.main()
        return
    evaluate.main()
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["total"] == 3 and len(results["unreadable"]) == 1 and says in results["unreadable"][0]
    rows = json.loads((tmp_path / "eval" / "predictions.json").read_text())
    assert [row["completion"] == "" for row in rows] == [False, True, False]


BAD_CLIPS = {
    "samples of 1e38": (np.full(16_000, 1e38, np.float32), 16_000, "samples as large as 1e\\+38"),
    "500 Hz": (np.zeros(16_000, np.float32), 500, "has 500 Hz"),
    "a million Hz": (np.zeros(200_000, np.float32), 1_000_000, "has 1000000 Hz"),
}


@pytest.mark.parametrize("samples, rate, says", BAD_CLIPS.values(), ids=BAD_CLIPS)
def test_a_clip_that_is_no_sound_is_refused(tmp_path, samples, rate, says):
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    with pytest.raises(BadInput, match=says):
        load_audio(str(tmp_path / "a.wav"))


@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2), (8_000, 1)])
def test_what_is_past_the_window_is_not_read(tmp_path, rate, channels):
    """And what is within it is what it would be."""
    rng = np.random.default_rng(0)
    clip = np.tile(rng.uniform(-0.5, 0.5, (10 * rate, channels)).astype(np.float32), (18, 1))  # three minutes
    soundfile.write(tmp_path / "long.flac", clip, rate)
    del clip
    whole = load_audio(str(tmp_path / "long.flac"))
    tracemalloc.start()
    wave = load_audio(str(tmp_path / "long.flac"), window=32_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(wave) == 32_001 and np.abs(wave - whole[:32_001]).max() < 1e-4
    assert peak < 8e6  # bytes; all of it would be 11 to 64 MB


@pytest.mark.parametrize("flag", ["--lr=nan", "--beta=inf", "--temperature=-inf", "--lora_alpha=nan"])
def test_numbers_that_are_none_are_refused(flag):
    name, _, value = flag.partition("=")
    with pytest.raises(BadInput, match=f"{name} must be a finite number, not {value}"):
        parse(train_grpo.Config, "", [flag])


def test_what_is_printed_cannot_steer_a_terminal(capsys):
    say("red \x1b[31m, bell \a, back \x9b, right to left \u202e, é 犬 😀\nsecond\tline")
    out = capsys.readouterr().out
    assert out == "red \\x1b[31m, bell \\x07, back \\x9b, right to left \\u202e, é 犬 😀\nsecond\tline\n"
    assert printable("plain") == "plain"


def test_a_terminal_that_lacks_a_character_shows_its_number(folder, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000) + 0.1, 16_000)
    rows = [OWN | {"question": "犬\x1b[2J?", "answer": "é"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, ROOT / "prepare_data.py", "check", "rows.json"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True)
    assert (
        done.returncode == 1
        and b"answer '\\xe9' is not among" in done.stdout
        and b"Traceback" not in done.stderr
    )


# ---------------------------------------------------------------- one run, one folder


def test_a_folder_belongs_to_one_run(folder, tmp_path, monkeypatch):
    code = f"import data; lock = data.lock_folder({str(tmp_path / 'run')!r})\n"
    code += "print('locked', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "locked\n"
    for resume in (False, True):
        with pytest.raises(BadInput, match="run: another run is at work in it"):
            run_script("train_sft", folder, tmp_path / "run", resume=resume)
    flags = ["--model", folder / "model", "--data", folder / "test.jsonl", "--output", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    with pytest.raises(BadInput, match="run: another run is at work in it"):
        evaluate.main()
    assert os.listdir(tmp_path / "run") == [".lock"]
    other.kill()
    other.wait()
    run_script("train_sft", folder, tmp_path / "run", max_steps=1)  # which a killed run does not keep out


def test_an_output_that_cannot_be_written_is_said_before_a_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda path: pytest.fail("loaded a model"))
    (tmp_path / "file").touch()
    flags = [
        "--model",
        folder / "model",
        "--data",
        folder / "test.jsonl",
        "--output",
        tmp_path / "file" / "eval",
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    with pytest.raises(BadInput, match="file/eval: cannot be written"):
        evaluate.main()


# ---------------------------------------------------------------- stops


@pytest.fixture
def own_data(folder, tmp_path):
    """The small toy's questions in a folder of the test's own."""
    shutil.copytree(folder / "train", tmp_path / "train")
    shutil.copy(folder / "train.jsonl", tmp_path)
    return dict(data=str(tmp_path / "train.jsonl"), max_steps=5, save_every=3)


def at_step(monkeypatch, script, step, action):
    """Do something within the body of a step."""
    calls, plain = [], training.optimizer_step

    def optimizer_step(*args):
        calls.append(1)
        if len(calls) == step + 1:
            action()
        return plain(*args)

    monkeypatch.setattr(f"{script}.optimizer_step", optimizer_step)


def test_a_clip_that_disappears_stops_a_run_that_saves(
    folder, tmp_path, monkeypatch, own_data, reward_odd_lengths
):
    run_script("train_grpo", folder, tmp_path / "whole", **own_data)
    gone = [row.audio for row in load_examples(own_data["data"])][data.stream_indices(24, 42, 16, 1)[0]]
    at_step(monkeypatch, "train_grpo", 1, lambda: os.rename(gone, gone + ".moved"))
    with pytest.raises(BadInput, match="no such audio file"):
        run_script("train_grpo", folder, tmp_path / "run", **own_data)
    assert [path[-1] for path in list_states(str(tmp_path / "run"))] == ["4"]  # all steps that were made
    os.rename(gone + ".moved", gone)
    run_script("train_grpo", folder, tmp_path / "run", resume=True, **own_data)
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)


def test_a_metrics_file_that_cannot_be_written_stops_a_run_that_saves(
    folder, tmp_path, monkeypatch, own_data
):
    def harm():
        (tmp_path / "run" / "metrics.jsonl").unlink()
        (tmp_path / "run" / "metrics.jsonl").mkdir()

    at_step(monkeypatch, "train_sft", 1, harm)
    with pytest.raises(OSError, match="metrics.jsonl"):
        run_script("train_sft", folder, tmp_path / "run", **own_data)
    assert [path[-1] for path in list_states(str(tmp_path / "run"))] == ["2"]


def test_a_folder_that_disappears_is_made_again_and_saved_in(folder, tmp_path, monkeypatch, own_data):
    at_step(monkeypatch, "train_sft", 1, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(OSError):
        run_script("train_sft", folder, tmp_path / "run", **own_data)
    assert [path[-1] for path in list_states(str(tmp_path / "run"))] == ["2"]


def test_a_loss_that_is_not_finite_stops_a_run_that_saves(folder, tmp_path, monkeypatch, own_data):
    forward, calls = train_grpo.grpo_loss, []

    def grpo_loss(*args):
        calls.append(1)
        loss, *more = forward(*args)
        return (loss * torch.nan if len(calls) > 8 else loss), *more

    monkeypatch.setattr(train_grpo, "grpo_loss", grpo_loss)
    with pytest.raises(BadInput, match="step 2: the loss is not finite"):
        run_script("train_grpo", folder, tmp_path / "run", **own_data)
    assert [path[-1] for path in list_states(str(tmp_path / "run"))] == ["2"]


def test_a_step_that_stops_a_run_again_and_again_can_be_skipped(folder, tmp_path, monkeypatch, own_data):
    """Resumed, a run meets the same prompts again; the message says how to get past them."""
    plain, broken = train_grpo.policy_logps, [e.location for e in load_examples(own_data["data"])]
    broken = broken[data.stream_indices(24, 42, 4 * 2, 1)[0]]  # of step 2
    steps, seen, held_out = training.steps, [], dict(eval_data=str(folder / "test.jsonl"), eval_every=2)

    def spy(run, *hooks):
        for step, batch in steps(run, *hooks):
            seen.append((step, any(example.location == broken for example in batch.examples)))
            yield step, batch

    def policy_logps(*args):
        logps = plain(*args)
        return logps * torch.nan if seen[-1][1] else logps

    monkeypatch.setattr(train_grpo, "steps", spy)
    monkeypatch.setattr(train_grpo, "policy_logps", policy_logps)
    for resume in (False, True):
        with pytest.raises(BadInput, match="step 2: .*; --resume --skip_steps 2 goes on without them"):
            run_script("train_grpo", folder, tmp_path / "run", resume=resume, **own_data, **held_out)
    skip = dict(resume=True, skip_steps=[2])
    run_script("train_grpo", folder, tmp_path / "run", **skip, **own_data, **held_out)
    assert (tmp_path / "run" / "checkpoint-3").exists()  # due after the step that was skipped
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert set(lines[2]) == {"step", "eval_accuracy"} and "eval_accuracy" not in lines[3]


@pytest.mark.parametrize("when, saved", [("within the run", "2"), ("after the last step", "4")])
def test_a_signal_during_held_out_evaluation_is_obeyed(
    folder, tmp_path, monkeypatch, own_data, reward_odd_lengths, when, saved
):
    """Between two of its batches; resumed, the run is the one that never stopped."""
    flags = own_data | dict(max_steps=4, save_every=9, eval_data=str(folder / "test.jsonl"), eval_every=2)
    flags |= dict(eval_batch_size=4)
    run_script("train_grpo", folder, tmp_path / "whole", **flags)
    batches, plain = [], evaluate.predict  # 3 batches an evaluation, before the steps 0 and 2 and after 3

    def predict(*args):
        batches.append(1)
        if len(batches) == {"2": 4, "4": 7}[saved]:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(evaluate, "predict", predict)
    with pytest.raises(SystemExit) as status:
        run_script("train_grpo", folder, tmp_path / "run", **flags)
    assert status.value.code == 128 + signal.SIGTERM and len(batches) == {"2": 4, "4": 7}[saved]
    assert [path[-1] for path in list_states(str(tmp_path / "run"))] == [saved]
    run_script("train_grpo", folder, tmp_path / "run", resume=True, **flags)
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)


# ---------------------------------------------------------------- resuming


def unfinished(folder, tmp_path, script="train_sft", **flags):
    """A run as if killed after its last checkpoint."""
    run_script(script, folder, tmp_path / "run", save_every=2, max_steps=3, **flags)
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    return tmp_path / "run", dict(save_every=2, max_steps=3, resume=True, **flags)


def test_what_was_read_is_what_counts(folder, tmp_path, monkeypatch, own_data):
    """The questions are edited while a run is at work: its state is that of the questions that it read."""
    questions = tmp_path / "train.jsonl"
    text = questions.read_text()
    at_step(monkeypatch, "train_sft", 0, lambda: questions.write_text(text * 2))
    run, flags = unfinished(folder, tmp_path, data=str(questions))
    with pytest.raises(BadInput, match="is not the file that the run was started with"):
        run_script("train_sft", folder, run, **flags)
    questions.write_text(text)
    run_script("train_sft", folder, run, **flags)


def test_questions_that_disappear_do_not_stop_a_save(folder, tmp_path, monkeypatch, own_data):
    at_step(monkeypatch, "train_sft", 0, (tmp_path / "train.jsonl").unlink)
    run_script("train_sft", folder, tmp_path / "run", **own_data)


@pytest.mark.parametrize("flags", [dict(lora_rank=2), {}], ids=["LoRA", "reference"])
def test_the_base_counts_too(folder, tmp_path, flags):
    shutil.copytree(folder / "model", tmp_path / "model")
    run, flags = unfinished(folder, tmp_path, "train_grpo", model=str(tmp_path / "model"), **flags)
    change_weights(lambda weights: weights[layer_of(weights)].mul_(1.01))(tmp_path / "model")
    with pytest.raises(BadInput, match="has not the weights that the run was started from"):
        run_script("train_grpo", folder, run, **flags)


def change_state(change):
    def harm(state):
        tensors = load_file(state / "process-0.safetensors")
        change(tensors)
        save_file(tensors, state / "process-0.safetensors")

    return harm


def stretch(tensors):
    name = next(name for name in tensors if name.startswith("exp_avg ") and tensors[name].dim() == 1)
    tensors[name] = tensors[name][:1].clone()


BAD_STATES = {
    "a moment is missing": (
        change_state(lambda t: t.pop("exp_avg " + "model.lm_head.weight")),
        "not those that were",
    ),
    "another shape": (change_state(stretch), "a tensor has the shape \\[1\\]"),
    "not a number": (change_state(lambda t: next(iter(t.values())).fill_(torch.nan)), "not finite"),
}


@pytest.mark.parametrize("harm, says", BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_is_whole_or_refused(folder, tmp_path, harm, says):
    run, flags = unfinished(folder, tmp_path)
    harm(run / "checkpoint-2" / "state")
    with pytest.raises(BadInput, match=f"--resume: .*{says}|{says}"):
        run_script("train_sft", folder, run, **flags)


def test_lines_of_metrics_that_are_none_are_dropped_with_a_word(folder, tmp_path, capsys):
    run, flags = unfinished(folder, tmp_path)
    before = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(
        "".join([before[0], "{broken\n", '{"no": "step"}\n', before[1], "[1]\n"]).encode()
        + b"\xff\xfe\n{half"
    )
    run_script("train_sft", folder, run, **flags)
    assert "4 lines of metrics.jsonl cannot be read and are dropped" in capsys.readouterr().out
    assert [line["step"] for line in metrics(run)] == [0, 1, 2]


def test_a_merge_that_was_interrupted_is_done_by_resume(folder, tmp_path, monkeypatch):
    flags = dict(save_every=2, max_steps=3, lora_rank=2, merge=True)
    run_script("train_sft", folder, tmp_path / "whole", **flags)

    def interrupted(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("checkpoints.merge", interrupted)
        run_script("train_sft", folder, tmp_path / "run", **flags)
    run_script("train_sft", folder, tmp_path / "run", resume=True, **flags)
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)
    one, two = (load_file(tmp_path / name / "merged" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path, monkeypatch):
    def harm():
        with torch.no_grad():
            next(p for p in seen[0].model.parameters() if p.requires_grad)[0] = torch.nan

    seen, plain = [], training.setup
    monkeypatch.setattr("train_sft.setup", lambda config: seen.append(plain(config)) or seen[0])
    at_step(monkeypatch, "train_sft", 1, harm)
    with pytest.raises(BadInput):
        run_script("train_sft", folder, tmp_path / "run", save_every=2, max_steps=2)
    assert not list_states(str(tmp_path / "run")) and not (tmp_path / "run" / "config.json").exists()


# ---------------------------------------------------------------- evaluation keeps what it has


@pytest.fixture
def evaluation(folder, tmp_path, monkeypatch):
    """Runs an evaluation of 12 questions in batches of 3; interrupted at a batch, if told so."""
    plain, batches = evaluate.predict, []

    def run(output, *more, stop_at=None):
        batches.clear()

        def predict(*args):
            batches.append(1)
            if len(batches) == stop_at:
                raise KeyboardInterrupt
            return plain(*args)

        monkeypatch.setattr(evaluate, "predict", predict)
        flags = ["--model", folder / "model", "--data", folder / "test.jsonl", "--output", tmp_path / output]
        flags += ["--max_new_tokens", 4, "--batch_size", 3, *more]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        evaluate.main()
        return len(batches)

    return run


def test_an_evaluation_goes_on_where_it_was_interrupted(tmp_path, evaluation):
    assert evaluation("whole") == 4
    with pytest.raises(KeyboardInterrupt):
        evaluation("run", stop_at=3)
    with open(tmp_path / "run" / "answers-0.jsonl", "a") as file:
        file.write("[6, ")  # half a line
    assert evaluation("run") == 2
    whole, run = ((tmp_path / name / "predictions.json").read_bytes() for name in ("whole", "run"))
    assert whole == run
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "predictions.json", "results.json"]


@pytest.mark.parametrize("flags", [("--max_new_tokens", 5), ("--audio_dir", "elsewhere")], ids=str)
def test_answers_of_another_evaluation_are_not_mixed_in(tmp_path, evaluation, folder, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "test", "elsewhere/test")
    with pytest.raises(KeyboardInterrupt):
        evaluation("run", stop_at=3)
    name = flags[0].removeprefix("--")
    with pytest.raises(BadInput, match=f"answers made with another {name}; remove it, or name another"):
        evaluation("run", *flags)


def test_a_clip_that_is_there_again_is_answered(tmp_path, evaluation, folder):
    rows = [json.loads(line) for line in open(folder / "test.jsonl")]
    shutil.copytree(folder / "test", tmp_path / "test")
    write(tmp_path / "test.jsonl", rows)
    (clip := tmp_path / "test" / "0001.wav").rename(tmp_path / "away.wav")
    with pytest.raises(KeyboardInterrupt):
        evaluation("run", "--data", tmp_path / "test.jsonl", stop_at=3)
    (tmp_path / "away.wav").rename(clip)
    assert evaluation("run", "--data", tmp_path / "test.jsonl") == 3  # the batch of that clip, and two more
    assert json.loads((tmp_path / "run" / "results.json").read_text())["unreadable"] == []


def test_sampled_answers_are_those_of_an_evaluation_that_never_stopped(tmp_path, evaluation):
    evaluation("whole", "--decoding", "model")
    with pytest.raises(KeyboardInterrupt):
        evaluation("run", "--decoding", "model", stop_at=3)
    evaluation("run", "--decoding", "model")
    whole, run = ((tmp_path / name / "predictions.json").read_bytes() for name in ("whole", "run"))
    assert whole == run


@pytest.mark.slow
def test_an_evaluation_killed_at_random_moments_loses_nothing(folder, tmp_path):
    """By SIGKILL, 20 times; each call adds at least one answer to what is there."""
    rows = [line for line in open(folder / "test.jsonl")] * 50
    (tmp_path / "many.jsonl").write_text("".join(rows))
    base = [
        sys.executable,
        ROOT / "evaluate.py",
        "--model",
        folder / "model",
        "--data",
        tmp_path / "many.jsonl",
    ]
    base += ["--audio_dir", folder, "--max_new_tokens", "4", "--batch_size", "2", "--output"]

    def answers():
        path = tmp_path / "run" / "answers-0.jsonl"
        return path.read_text().count("\n[") if path.exists() else 0

    chance, kills = random.Random(0), []
    while len(kills) < 20:
        before = answers()
        process = subprocess.Popen(
            [*base, tmp_path / "run"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and answers() == before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        assert process.poll() is None, "ended before the last kill: give it more rows"
        process.kill()
        process.wait()
        kills.append(answers())
    assert kills == sorted(set(kills))
    for name in ("run", "whole"):
        subprocess.run([*base, tmp_path / name], check=True, capture_output=True)
    whole, run = ((tmp_path / name / "predictions.json").read_bytes() for name in ("whole", "run"))
    assert whole == run


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_a_problem_of_one_process_stops_and_saves_both(folder, tmp_path, own_data, fsdp):
    """A clip of the second process disappears; the run that is resumed is the one that never stopped."""
    settings = {name: config("train_grpo", folder, tmp_path / name, **own_data) for name in ("whole", "run")}
    launch(training_code("train_grpo"), *as_flags(settings["whole"]), fsdp=fsdp)
    examples = load_examples(own_data["data"])
    gone = examples[data.stream_indices(24, 42, 4 * 3 + 2, 1)[0]].audio  # of step 3
    code = (
        "import os, training\nplain, calls = training.optimizer_step, []\n"
        "def optimizer_step(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 1 and Accelerator().is_main_process:\n"
        f"        os.rename({gone!r}, {gone + '.moved'!r})\n"
        "    return plain(*args)\n"
        "train_grpo.optimizer_step = optimizer_step\n"
    )
    with pytest.raises(AssertionError, match="no such audio file"):
        launch(training_code("train_grpo", code), *as_flags(settings["run"]), fsdp=fsdp)
    (state,) = list_states(str(tmp_path / "run"))
    assert int(state.rsplit("-", 1)[1]) in (1, 2, 3)
    os.rename(gone + ".moved", gone)
    launch(training_code("train_grpo"), *as_flags(settings["run"]), "--resume=True", fsdp=fsdp)
    assert_same_run(tmp_path / "whole", tmp_path / "run", exact=True)


@pytest.mark.slow
def test_metrics_that_one_process_cannot_write_stop_and_save_both(folder, tmp_path, own_data):
    """At a step that is saved anyway; the other process must not wait in vain."""
    settings = config("train_grpo", folder, tmp_path / "run", **own_data)
    code = (
        "import os, training\nplain, calls = training.optimizer_step, []\n"
        "def optimizer_step(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3 and Accelerator().is_main_process:\n"
        f"        os.remove({str(tmp_path / 'run' / 'metrics.jsonl')!r})\n"
        f"        os.mkdir({str(tmp_path / 'run' / 'metrics.jsonl')!r})\n"
        "    return plain(*args)\n"
        "train_grpo.optimizer_step = optimizer_step\n"
    )
    with pytest.raises(AssertionError, match="Is a directory"):
        launch(training_code("train_grpo", code), *as_flags(settings))
    assert [path[-1] for path in list_states(str(tmp_path / "run"))] == ["3"]


@pytest.mark.slow
def test_a_held_out_clip_that_one_process_cannot_read_stops_and_saves_both(folder, tmp_path, own_data):
    """In the evaluation of the final model, after which there is nothing more to train."""
    rows = [json.loads(line) for line in open(folder / "test.jsonl")][:4]
    for n, row in enumerate(rows):
        row["audio"] = str(tmp_path / f"{n}.wav")
        shutil.copy(folder / "test" / f"000{n}.wav", row["audio"])
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = own_data | dict(eval_data=str(tmp_path / "test.jsonl"), eval_every=100)
    code = (
        "import training\nplain, calls = training.optimizer_step, []\n"
        "def optimizer_step(*args):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == 5: open({str(tmp_path / '1.wav')!r}, 'w').close()\n"
        "    return plain(*args)\n"
        "train_grpo.optimizer_step = optimizer_step\n"
    )
    settings = config("train_grpo", folder, tmp_path / "run", **flags)
    with pytest.raises(AssertionError, match="1.wav: cannot be read as audio"):
        launch(training_code("train_grpo", code), *as_flags(settings))
    assert [path[-1] for path in list_states(str(tmp_path / "run"))] == ["5"]


def test_scores_of_two_files_in_a_folder_do_not_overwrite_each_other(tmp_path, monkeypatch):
    row = {"choices": ["dog", "cat"], "answer": "dog"}
    for name, said in (("predictions", "dog"), ("other", "cat")):
        (tmp_path / f"{name}.json").write_text(json.dumps([row | {"model_output": said}]))
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--score", str(tmp_path / f"{name}.json")])
        evaluate.main()
    read = lambda name: json.loads((tmp_path / name).read_text())["accuracy"]  # noqa: E731
    assert (read("results.json"), read("other.results.json")) == (1, 0)


def test_a_comparison_without_predictions_is_refused(tmp_path, monkeypatch, capsys):
    row = {"choices": ["dog", "cat"], "answer": "dog"}
    said = [row | {"question": str(n), "model_output": "dog"} for n in range(3)]
    bare = [{key: value for key, value in line.items() if key != "model_output"} for line in said]
    for name, rows in (("a", said), ("bare", bare), ("some", said[:1] + bare[1:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))

    def compare(*names):
        paths = [str(tmp_path / f"{name}.json") for name in names]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--compare", *paths])
        evaluate.main()

    with pytest.raises(BadInput, match="bare.json: no row has a prediction"):
        compare("a", "bare")
    compare("a", "some")
    assert "some.json: 2 rows have no prediction and count as wrong" in capsys.readouterr().out
