"""Rewards and scoring: pure functions of text, of rows with predictions, and of what was right and wrong.

The reward of a completion is accuracy + format, each 0 or 1 (R1-AQA, arXiv 2503.11197). Both compare text
with text; nothing is parsed as mathematics, which would take "Woman 1" for "Man 1".
"""

import math
import re
from collections import defaultdict

from data import BadInput, blame, choice_at

TEXT = r"\s*(?!\s)(?:(?!</?(?:think|answer)>).)+"  # not blank, and no tag in it
FORMATS = {
    "plain": TEXT,
    "answer": rf"\s*<answer>{TEXT}</answer>\s*",
    "think": rf"\s*<think>{TEXT}</think>\s*<answer>{TEXT}</answer>\s*",
}


def extract_answer(completion: str, prompt: str) -> str:
    """The final answer: the first answer block, else (and for `plain`) the whole text; stripped."""
    block = None if prompt == "plain" else re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return (block[1] if block else completion).strip()


def accuracy_reward(completion: str, answer: str, prompt: str) -> float:
    """1 if the extracted answer equals the text of the true option, letter for letter; else 0."""
    return float(extract_answer(completion, prompt) == answer.strip())


def format_reward(completion: str, prompt: str) -> float:
    """1 if the completion is exactly what the prompt asked for, else 0; white space around blocks is ignored.

    `answer`: one answer block. `think`: one think block, then one answer block. `plain`: text without such
    tags. An empty block is not an answer.
    """
    return float(re.fullmatch(FORMATS[prompt], completion, re.DOTALL) is not None)


def mmau_match(prediction: str, answer: str, choices: list[str]) -> bool:
    """MMAU's rule for a right answer, on sets of lower-case words.

    Right if the prediction holds every word of the answer and no word that only another option has. Options
    with the same words as the answer are ignored; an empty prediction is wrong.
    """
    predicted, true = words(prediction), words(answer)
    wrong = set().union(*(words(choice) - true for choice in choices))
    return bool(predicted) and true <= predicted and predicted.isdisjoint(wrong)


def words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


# ---------------------------------------------------------------- scoring rows

# keys of MMAU and, the last, of MMAR
GROUPS = ("task", "difficulty", "sub-category", "modality")


def judge(row: object, location: str) -> bool | None:
    """Whether a row's prediction is right by MMAU's rule; None where there is no answer to compare with."""
    if not isinstance(row, dict):
        raise BadInput(f"{location}: not a JSON object")
    if "unusable" in row:  # as evaluate.py marks what it could not read
        return False
    if row.get("answer") is None or row["answer"] == "":
        return None
    return mmau_match(prediction_of(row) or "", *answer_and_choices(row, location))


def answer_and_choices(row: dict, location: str) -> tuple[str, list[str]]:
    """The text of a row's answer, and its options."""
    choices, answer = row.get("multi_choice" if "multi_choice" in row else "choices"), row["answer"]
    if not isinstance(choices, list):
        raise BadInput(f"{location}: no list of options (key 'choices')")
    if "multi_choice" in row:  # AVQA's answers are indices
        with blame(location):
            answer = choice_at(answer, choices)
    return str(answer), [str(choice) for choice in choices]


def prediction_of(row: dict) -> str | None:
    """A row's prediction under either key of the benchmark's script; None where there is none, or nan."""
    values = [row.get(key) for key in ("model_output", "model_prediction")]
    values = [str(value) for value in values if value is not None and value == value]
    return next(filter(str.strip, values), "" if values else None)


def tally(marks: list[bool]) -> dict:
    """Accuracy with its interval; None for no marks."""
    correct, total = sum(marks), len(marks)
    accuracy, interval = (correct / total, wilson_interval(correct, total)) if total else (None, None)
    return {"accuracy": accuracy, "interval": interval, "correct": correct, "total": total}


def by_group(rows: list[dict], values: list) -> dict[str, dict[str, list]]:
    """The values, one a row, sorted into {key: {value of that key: [...]}}; None is left out."""
    groups = {key: defaultdict(list) for key in GROUPS}
    for row, value in zip(rows, values, strict=True):
        for key in GROUPS:
            if value is not None and key in row:
                groups[key][str(row[key])].append(value)
    return {key: dict(sorted(group.items())) for key, group in groups.items()}


def score(located: list[tuple]) -> dict:
    """Accuracy of rows with their locations, overall and by group; one without a prediction is wrong."""
    marks, rows = [judge(*row) for row in located], [row for row, _ in located]
    judged = [row for row, mark in zip(located, marks) if mark is not None and "unusable" not in row[0]]
    answers = [answer_and_choices(*row) for row in judged]
    if not answers:  # MMAU's Test: what could not be read is not wrong either
        marks = [None] * len(rows)
    groups = by_group(rows, marks).items()
    return {
        **tally([mark for mark in marks if mark is not None]),
        "unanswered": marks.count(None),
        "missing": sum(prediction_of(row) is None for row in rows),
        "odd_answers": sum(words(answer) not in map(words, choices) for answer, choices in answers),
        "by": {key: {name: tally(part) for name, part in group.items()} for key, group in groups},
    }


# ---------------------------------------------------------------- how sure an accuracy is

Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of an accuracy (Wilson 1927)."""
    p, scale = correct / total, 1 + Z * Z / total
    middle = (p + Z * Z / (2 * total)) / scale
    half = Z * math.sqrt(p * (1 - p) / total + (Z / (2 * total)) ** 2) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar_p(b: int, c: int) -> float:
    """Exact two-sided p-value where one model alone is right on b rows, the other on c (McNemar 1947)."""
    return min(1.0, 2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c))


def paired_difference(pairs: list[tuple[bool, bool]]) -> tuple[float, float, float, float]:
    """Second minus first accuracy, its 95 % interval (Bonett and Price 2012), and McNemar's p-value."""
    n, b, c = len(pairs), sum(y and not x for x, y in pairs), sum(x and not y for x, y in pairs)
    p, q = (b + 1) / (n + 2), (c + 1) / (n + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return (b - c) / n, max(-1.0, p - q - half), min(1.0, p - q + half), mcnemar_p(b, c)
