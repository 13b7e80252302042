"""Rewards, the benchmark's rule and statistics, against values by hand, from papers, or by simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest

from rewards import accuracy_reward, extract_answer, format_reward, judge, mcnemar_p, mmau_match
from rewards import paired_difference, wilson_interval

ANSWER = "<answer>dog</answer>"
THINK = "<think>it barks</think><answer>dog</answer>"


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    "prompt, completion, reward",
    [
        ("answer", ANSWER, 1),
        ("answer", f"\n {ANSWER}\n", 1),
        ("answer", "<answer>a\nb < c</answer>", 1),
        ("answer", f"It is {ANSWER}", 0),
        ("answer", f"{ANSWER}.", 0),
        ("answer", ANSWER + ANSWER, 0),
        ("answer", "<answer>dog", 0),
        ("answer", "<answer></answer>", 0),
        ("answer", "<answer> \n</answer>", 0),
        ("answer", "<answer><answer>dog</answer></answer>", 0),
        ("answer", "<Answer>dog</Answer>", 0),
        ("answer", "dog", 0),
        ("answer", "", 0),
        ("answer", THINK, 0),
        ("think", THINK, 1),
        ("think", "<think>a\nb</think>\n\n<answer>dog</answer>\n", 1),
        ("think", ANSWER, 0),
        ("think", "<answer>dog</answer><think>it barks</think>", 0),
        ("think", THINK + ANSWER, 0),
        ("think", "<think>it barks</think> so <answer>dog</answer>", 0),
        ("think", "<think>it barks<answer>dog</answer>", 0),
        ("think", "<think></think><answer>dog</answer>", 0),
        ("plain", "dog", 1),
        ("plain", "", 0),
        ("plain", " \n", 0),
        ("plain", ANSWER, 0),
    ],
)
def test_format_reward_is_for_exactly_what_the_prompt_asks(prompt, completion, reward):
    assert format_reward(completion, prompt) == reward


@pytest.mark.parametrize(
    "prompt, completion, answer",
    [
        ("answer", "<answer> dog\n</answer>", "dog"),
        ("answer", "First <answer>dog</answer>, then <answer>cat</answer>", "dog"),
        ("answer", " dog ", "dog"),
        ("answer", "<answer>dog", "<answer>dog"),
        ("answer", "<answer>a\nb</answer>", "a\nb"),
        ("think", THINK, "dog"),
        ("plain", " dog\n", "dog"),
        ("plain", ANSWER, ANSWER),
        ("answer", "", ""),
    ],
)
def test_the_answer_is_the_first_block_else_the_complete_text(prompt, completion, answer):
    assert extract_answer(completion, prompt) == answer


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        ("<answer>Man 1</answer>", " Man 1 ", 1),
        ("<answer>Woman 1</answer>", "Man 1", 0),  # math_verify compares 1 with 1
        ("<answer>B. 3</answer>", "D. 3", 0),
        ("<answer>man 1</answer>", "Man 1", 0),
        ("Man 1", "Man 1", 1),  # the block matters for the format reward only
    ],
)
def test_accuracy_compares_text_with_text(completion, answer, reward):
    assert accuracy_reward(completion, answer, "answer") == reward


# ---------------------------------------------------------------- the benchmark's rule


@pytest.mark.parametrize(
    "prediction, answer, choices, is_correct",
    [
        ("dog", "dog", ["dog", "cat"], True),
        ("DOG!", "dog", ["dog", "cat"], True),
        ("a small dog", "dog", ["dog", "cat"], True),
        ("dog or cat", "dog", ["dog", "cat"], False),
        ("cat", "dog", ["dog", "cat"], False),
        ("", "dog", ["dog", "cat"], False),
        ("?!", "dog", ["dog", "cat"], False),
        ("dogs", "dog", ["dog", "cat"], False),
        ("red", "dark red", ["dark red", "red"], False),  # a word of the answer is missing
        ("dark red", "dark red", ["dark red", "red"], True),  # the options share a word
        ("dark red", "red", ["dark red", "red"], False),
        ("up then down", "up then down", ["up", "down", "up then down"], True),
        ("red dark", "dark red", ["dark red", "red dark", "blue"], True),  # the same set of words
        ("dog", "dog", ["dog", "dog", "cat"], True),
        ("2.82", "2.82 seconds", ["2.82 seconds", "2.83 seconds"], False),
        ("2.82 seconds", "2.82 seconds", ["2.82 seconds", "2.83 seconds"], True),
        ("Émile", "émile", ["émile", "zoé"], True),
    ],
)
def test_mmau_rule_by_hand(prediction, answer, choices, is_correct):
    assert mmau_match(prediction, answer, choices) is is_correct


ROW = {"choices": ["dog", "cat"], "answer": "dog"}
AVQA = {"multi_choice": ["dog", "cat"], "answer": 1}
ROWS = {
    "one key": (ROW | {"model_output": "dog"}, True),
    "the other key": (ROW | {"model_prediction": "dog"}, True),
    "null under one key": (ROW | {"model_output": None, "model_prediction": "dog"}, True),
    "blank under one key": (ROW | {"model_output": " ", "model_prediction": "dog"}, True),
    "nan under one key": (ROW | {"model_output": float("nan"), "model_prediction": "dog"}, True),
    "null": (ROW | {"model_output": None}, False),
    "no prediction": (ROW, False),
    "empty prediction": (ROW | {"model_output": ""}, False),
    "numbers": ({"choices": [2, 3], "answer": 2, "model_output": 2}, True),
    "no answer": ({"choices": ["dog", "cat"], "model_output": "dog"}, None),
    "empty answer": (ROW | {"answer": "", "model_output": "dog"}, None),
    "answer is nan": (ROW | {"answer": float("nan"), "model_output": "dog"}, None),
    "the answer is not an option": (ROW | {"answer": "a hound", "model_output": "a hound"}, True),
    "AVQA": (AVQA | {"model_output": "cat"}, True),
    "AVQA with other options": (AVQA | {"choices": ["a", "b"], "model_output": "cat"}, True),
    "no options": (ROW | {"choices": None, "model_output": "dog", "unusable": "no options"}, False),
    "not a question": ({"model_output": "dog", "unusable": "not a JSON object"}, False),
}


@pytest.mark.parametrize("row, is_correct", ROWS.values(), ids=ROWS)
def test_odd_rows_are_judged(row, is_correct):
    """None: a row without an answer is not scored."""
    assert judge(row, "") is is_correct


# ---------------------------------------------------------------- uncertainty


@pytest.mark.parametrize(
    "correct, total, low, high",  # Newcombe 1998, Table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx([low, high], abs=5e-5)


def test_mcnemar_p_values_are_the_published_ones():
    # R's exact2x2: mcnemar.exact(matrix(c(21, 9, 2, 12), 2, 2))
    assert mcnemar_p(9, 2) == pytest.approx(0.06543, abs=5e-6)
    # Fagerland et al. 2013, Bentur's stem cell data
    assert mcnemar_p(1, 7) == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar_p(5, 0) == 0.0625
    assert mcnemar_p(0, 0) == mcnemar_p(3, 3) == 1
    assert 0 <= mcnemar_p(600, 9000) < 1e-300


@pytest.mark.parametrize("b", [440, 470, 500, 501])
def test_many_rows_are_compared_by_the_normal_approximation(b):
    exact = 2 * sum(Fraction(math.comb(1001, k), 2**1001) for k in range(min(b, 1001 - b) + 1))
    assert mcnemar_p(b, 1001 - b) == pytest.approx(min(1, float(exact)), rel=0.02)


def test_the_paired_interval_contains_the_difference_in_95_of_100_samples():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        first = rng.random(300) < 0.6
        second = np.where(rng.random(300) < 0.8, first, rng.random(300) < 0.85)  # right in 65 %
        difference, low, high, _ = paired_difference(list(zip(first, second)))
        assert difference == pytest.approx(second.mean() - first.mean())
        inside += low <= 0.05 <= high
    assert 930 <= inside <= 970
