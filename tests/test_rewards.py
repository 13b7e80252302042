import pytest

from rewards import accuracy_reward, extract_answer, format_reward, mmau_match

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
    assert accuracy_reward("Man 1", "Man 1", "answer") == 1  # right without the block; the format reward is its own


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
        ("red dark", "dark red", ["dark red", "red dark", "blue"], True),  # the same words are the same answer
        ("dog", "dog", ["dog", "dog", "cat"], True),
        ("2.82", "2.82 seconds", ["2.82 seconds", "2.83 seconds"], False),
        ("2.82 seconds", "2.82 seconds", ["2.82 seconds", "2.83 seconds"], True),
        ("Émile", "émile", ["émile", "zoé"], True),
    ],
)
def test_mmau_rule_by_hand(prediction, answer, choices, right):
    assert mmau_match(prediction, answer, choices) is right
