"""How tools/rules.py scores the same answers under several rules, against counts by hand."""

import sys

import pytest
from conftest import write

from cli import BadInput
from tools import rules

OPTIONS = ["dog", "cat", "a seal", "Rain. A storm"]


def question(answer, prediction, **more):
    return {"question": "?", "choices": OPTIONS, "answer": answer, "model_output": prediction, **more}


PARSED = [  # text, lmms-eval's letter, evalscope's
    ("B", "B", "B"),
    ("b", None, None),
    ("(B)", "B", "B"),
    ("B.", "B", "B"),
    ("B) dog", None, None),
    ("B. dog", "B", "B"),
    ("It is B, I think", None, None),
    ("It is B I think", "B", "B"),
    ("(C) or B ", "C", "C"),
    ("not A but B here", "B", "B"),
    ("B here, not A at all", "A", "A"),
    ("(A) and (B)", "A", "A"),
    ("dog", None, None),
    ("Answer: dog", None, "D"),
    ("ANSWER: c", None, "C"),
    ("E", None, None),
    ("", None, None),
]


@pytest.mark.parametrize("text, lmms_eval, evalscope", PARSED)
def test_letters_are_read_as_the_harnesses_do(text, lmms_eval, evalscope):
    assert rules.lmms_eval_letter(text) == lmms_eval
    assert rules.evalscope_letter(text) == evalscope


TEN = [  # right by MMAU, exact option, lmms-eval, evalscope; "-" is unparsed
    (question("dog", "dog"), "yy--"),
    (question("cat", "cat"), "yy--"),
    (question("cat", "Cat"), "yn--"),
    (question("cat", "B"), "nnyy"),
    (question("cat", "(B) cat"), "ynyy"),
    (question("cat", "(A) cat"), "nnnn"),  # "a" is a word that only other options have
    (question("a seal", "A"), "nnnn"),
    (question("Rain. A storm", "Rain. A storm"), "yynn"),
    (question("cat", None), "nn--"),
    (question("cat", "", unusable="its clip is missing"), "nnnn"),
]


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["rules", *map(str, flags)])
    rules.main()


def test_ten_answers_under_four_rules(tmp_path, monkeypatch, capsys):
    rows = [row for row, _ in TEN] + [question("", "dog")]
    scores = rules.score_rules([(row, "here") for row in rows])
    for i, score in enumerate(scores.values()):
        marks = [expected[i] for _, expected in TEN]
        assert (score.right, score.total, score.unparsed) == (marks.count("y"), 10, marks.count("-"))
    # for the four unparsed answers lmms-eval guesses one of four letters; evalscope takes A, right once
    assert scores["lmms-eval"].published == pytest.approx((2 + 4 / 4) / 10)
    assert scores["evalscope"].published == pytest.approx((2 + 1) / 10)

    run(monkeypatch, write(tmp_path / "rows.json", rows))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:22].split()[-1] for line in lines[1:5]] == ["50.0%", "30.0%", "20.0%", "20.0%"]
    assert lines[3].split()[-2:] == ["40.0%", "30.0%"]


def test_right_answers_in_four_forms(tmp_path, monkeypatch, capsys):
    """By hand: "dog" yields no letter, and A is right for it; the storm yields A, where D is right.

    By MMAU's rule "(A) dog" is wrong, because the word "a" is only in other options.
    """
    questions = [
        {"question": "?", "choices": OPTIONS, "answer": "dog"},
        {"question": "?", "choices": OPTIONS, "answer": "Rain. A storm"},
    ]
    run(monkeypatch, "--table", write(tmp_path / "questions.json", questions))
    assert capsys.readouterr().out.splitlines() == [
        "| right answers, written as | MMAU | exact option | lmms-eval | evalscope |",
        "| --- | --- | --- | --- | --- |",
        "| the option's text | 100.0 | 100.0 | 0.0 (50.0 unparsed; reported as 12.5) | "
        "0.0 (50.0 unparsed; reported as 50.0) |",
        "| a bare letter | 0.0 | 0.0 | 100.0 | 100.0 |",
        "| (B) text | 50.0 | 0.0 | 100.0 | 100.0 |",
        "| B. text | 50.0 | 0.0 | 50.0 | 50.0 |",
    ]


def test_options_of_two_and_of_five():
    """A letter past the options is wrong, and so is every option past D: the parsers do not know E."""
    two = {"choices": ["dog", "cat"], "answer": "dog", "model_output": "D"}
    five = {"choices": ["a", "b", "c", "d", "dog"], "answer": "dog", "model_output": "E"}
    scores = rules.score_rules([(two, ""), (five, "")])
    assert (scores["lmms-eval"].right, scores["lmms-eval"].unparsed) == (0, 1)
    assert scores["evalscope"].published == 0


BAD = {
    "no answers": ([], {"choices": ["a", "b"], "model_output": "a"}, "has no answers to compare with"),
    "no predictions": ([], {"choices": ["a", "b"], "answer": "a"}, "no row has a prediction"),
    "no options": ([], {"answer": "a", "model_output": "a"}, "row 1: no list of options"),
    "a table without answers": (["--table"], {"choices": ["a", "b"]}, "has no answers"),
    "a letter as answer": (["--table"], {"choices": ["a", "b"], "answer": "C"}, "is not among the options"),
}


@pytest.mark.parametrize("flags, row, message", BAD.values(), ids=BAD)
def test_files_without_answers_predictions_or_options_are_refused(tmp_path, monkeypatch, flags, row, message):
    path = write(tmp_path / "rows.json", [row], as_list=True)
    with pytest.raises(BadInput, match=message):
        run(monkeypatch, *flags, path)
