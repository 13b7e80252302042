import numpy as np
import pytest

from rewards import (
    accuracy_reward,
    extract_answer,
    format_reward,
    mcnemar_p,
    mmau_match,
    paired_difference,
    wilson_interval,
)

ANSWER, THINK = "<answer>dog</answer>", "<think>it barks</think><answer>dog</answer>"


@pytest.mark.parametrize(
    "prompt, completion, score",
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
def test_format_reward_is_for_exactly_what_was_asked(prompt, completion, score):
    assert format_reward(completion, prompt) == score


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
def test_the_answer_is_the_first_block_else_the_whole_text(prompt, completion, answer):
    assert extract_answer(completion, prompt) == answer


def test_accuracy_is_text_against_text():
    assert accuracy_reward("<answer>Man 1</answer>", " Man 1 ", "answer") == 1
    assert accuracy_reward("<answer>Woman 1</answer>", "Man 1", "answer") == 0  # math_verify sees 1 = 1
    assert accuracy_reward("<answer>B. 3</answer>", "D. 3", "answer") == 0
    assert accuracy_reward("<answer>man 1</answer>", "Man 1", "answer") == 0
    assert (
        accuracy_reward("Man 1", "Man 1", "answer") == 1
    )  # right without the block; the format reward is its own


@pytest.mark.parametrize(
    "prediction, answer, choices, right",
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
        ("dark red", "dark red", ["dark red", "red"], True),  # what the answer shares is no fault
        ("dark red", "red", ["dark red", "red"], False),
        ("up then down", "up then down", ["up", "down", "up then down"], True),
        (
            "red dark",
            "dark red",
            ["dark red", "red dark", "blue"],
            True,
        ),  # the same words are the same answer
        ("dog", "dog", ["dog", "dog", "cat"], True),
        ("2.82", "2.82 seconds", ["2.82 seconds", "2.83 seconds"], False),
        ("2.82 seconds", "2.82 seconds", ["2.82 seconds", "2.83 seconds"], True),
        ("Émile", "émile", ["émile", "zoé"], True),
    ],
)
def test_mmau_rule_by_hand(prediction, answer, choices, right):
    assert mmau_match(prediction, answer, choices) is right


@pytest.mark.parametrize(
    "correct, total, low, high",  # Newcombe 1998, Table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx([low, high], abs=5e-5)


def test_mcnemar_is_the_published_one():
    assert mcnemar_p(9, 2) == pytest.approx(
        0.06543, abs=5e-6
    )  # R's exact2x2, mcnemar.exact(matrix(c(21, 9, 2, 12), 2, 2))
    assert mcnemar_p(1, 7) == pytest.approx(
        0.0703, abs=5e-5
    )  # Fagerland et al. 2013, Bentur's stem cell data
    assert mcnemar_p(5, 0) == 0.0625 and mcnemar_p(0, 0) == mcnemar_p(3, 3) == 1
    assert 0 <= mcnemar_p(600, 9000) < 1e-300


def test_the_paired_interval_holds_the_difference_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        a = rng.random(300) < 0.6
        b = np.where(rng.random(300) < 0.8, a, rng.random(300) < 0.85)  # right in 65 %: 5 points more
        d, low, high, _ = paired_difference(list(zip(a, b)))
        inside += low <= 0.05 <= high
        assert d == pytest.approx(b.mean() - a.mean())
    assert 930 <= inside <= 970
