"""Rewards and scoring: pure functions of text, rows with predictions, and right/wrong marks.

The reward of a completion is accuracy + format, each 0 or 1 (R1-AQA, arXiv 2503.11197). Both compare
plain text; nothing is parsed as math, which would treat "Woman 1" and "Man 1" as equal.
"""

import math
import re
from collections import defaultdict

from cli import BadInput, located
from data import choice_at, has_answer

TEXT = r"\s*(?!\s)(?:(?!</?(?:think|answer)>).)+"  # not blank, and without any of the tags
FORMATS = {
    "plain": TEXT,
    "answer": rf"\s*<answer>{TEXT}</answer>\s*",
    "think": rf"\s*<think>{TEXT}</think>\s*<answer>{TEXT}</answer>\s*",
}


def extract_answer(completion: str, prompt: str) -> str:
    """The final answer, stripped: the first answer block, else (and for `plain`) the whole text."""
    block = None
    if prompt != "plain":
        block = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return (block[1] if block else completion).strip()


def accuracy_reward(completion: str, answer: str, prompt: str) -> float:
    """1 if the extracted answer equals the text of the correct option, letter for letter; else 0."""
    return float(extract_answer(completion, prompt) == answer.strip())


def format_reward(completion: str, prompt: str) -> float:
    """1 if the completion is exactly what the prompt asked for, else 0; whitespace around blocks is ignored.

    `answer`: one answer block. `think`: one think block, then one answer block. `plain`: text without these
    tags. Empty blocks do not count.
    """
    return float(re.fullmatch(FORMATS[prompt], completion, re.DOTALL) is not None)


def mmau_match(prediction: str, answer: str, choices: list[str]) -> bool:
    """MMAU's rule for a correct answer, on sets of lower-case words.

    Correct if the prediction contains every word of the answer and no word that only another option has.
    Options with the same words as the answer are ignored; an empty prediction is wrong.
    """
    predicted = words(prediction)
    correct = words(answer)
    wrong = set()
    for choice in choices:
        wrong |= words(choice) - correct
    return bool(predicted) and correct <= predicted and predicted.isdisjoint(wrong)


def words(text: str) -> set[str]:
    """The lower-case words of a text, as MMAU's script splits it."""
    return set(re.findall(r"\b\w+\b", text.lower()))


# ---------------------------------------------------------------- scoring rows

# columns to break accuracy down by: those of MMAU and, last, one of MMAR
GROUPS = ("task", "difficulty", "sub-category", "modality")


def judge(row: object, location: str) -> bool | None:
    """Whether a row's prediction is correct by MMAU's rule; None if the row has no answer."""
    if not isinstance(row, dict):
        raise BadInput(f"{location}: not a JSON object")
    if "unusable" in row:  # set by evaluate.py for a row that it could not read
        return False
    if not has_answer(row):
        return None
    answer, choices = answer_and_choices(row, location)
    return mmau_match(prediction_of(row) or "", answer, choices)


def answer_and_choices(row: dict, location: str) -> tuple[str, list[str]]:
    """The text of a row's answer, and its options."""
    answer = row["answer"]
    is_avqa = "multi_choice" in row
    choices = row.get("multi_choice" if is_avqa else "choices")
    if not isinstance(choices, list):
        raise BadInput(f"{location}: no list of options (key 'choices')")
    if is_avqa:
        with located(location):
            answer = choice_at(answer, choices)
    return str(answer), [str(choice) for choice in choices]


def prediction_of(row: dict) -> str | None:
    """A row's prediction under either key of the benchmark's script; None if it is missing or nan."""
    found = None
    for key in ("model_output", "model_prediction"):
        value = row.get(key)
        if value is None or value != value:  # nan, as pandas writes it, does not equal itself
            continue
        if str(value).strip():
            return str(value)
        found = ""
    return found


def score(rows: list[tuple]) -> dict:
    """Accuracy of (row, location) pairs, overall and by group; a row without a prediction is wrong."""
    marks = [judge(row, location) for row, location in rows]
    odd_answers = 0
    letters = 0  # predictions such as "B", "(b)" or "2"
    has_answers = False
    for (row, location), mark in zip(rows, marks):
        if mark is not None and "unusable" not in row:
            has_answers = True
            answer, choices = answer_and_choices(row, location)
            odd_answers += words(answer) not in [words(choice) for choice in choices]
            prediction = (prediction_of(row) or "").strip()
            is_letter = re.fullmatch(r"\(?([a-zA-Z]|\d+)\)?[.:]?", prediction) is not None
            letters += is_letter and words(prediction) not in [words(choice) for choice in choices]
    if not has_answers:  # as in MMAU's Test: then an unusable row is not wrong either
        marks = [None] * len(rows)

    only_rows = [row for row, _ in rows]
    groups = {}
    for key, parts in by_group(only_rows, marks).items():
        groups[key] = {name: tally(part) for name, part in parts.items()}
    return {
        **tally([mark for mark in marks if mark is not None]),
        "unanswered": marks.count(None),
        "missing": sum(prediction_of(row) is None for row in only_rows),
        "odd_answers": odd_answers,
        "letters": letters,
        "by": groups,
    }


def score_hearing(rows: list[tuple]) -> dict:
    """What the clip adds to accuracy, from rows also answered without their clip (evaluate.py --hearing).

    Returns {"audio_gain": ...}: three accuracies and the two paired gains, overall and by task; {} if no row
    has such answers. A row is left out if one of its three answers or the right answer is missing.
    """
    only_rows = []
    triples = []  # whether it is right with the clip, with silence, and with another question's clip
    for row, location in rows:
        triple = None
        if isinstance(row, dict) and None not in (row.get("silence_output"), row.get("other_output")):
            marks = [judge(row, location)]
            for key in ("silence_output", "other_output"):
                marks.append(judge(with_prediction(row, row[key]), location))
            triple = None if None in marks else tuple(marks)
        only_rows.append(row)
        triples.append(triple)
    answered = [triple for triple in triples if triple is not None]
    if not answered:
        return {}
    by_task = by_group(only_rows, triples)["task"]
    results = gains(answered)
    results["by_task"] = {name: gains(part) for name, part in by_task.items()}
    return {"audio_gain": results}


def gains(triples: list[tuple[bool, bool, bool]]) -> dict:
    """Accuracy with the clip, with silence and with another clip, and the clip's gain over the others."""
    results = {"total": len(triples)}
    for i, name in enumerate(("clip", "silence", "other")):
        results[name] = tally([triple[i] for triple in triples])
    for i, name in ((1, "silence"), (2, "other")):
        gain, low, high, p = paired_difference([(triple[i], triple[0]) for triple in triples])
        results[f"gain_over_{name}"] = {"gain": gain, "interval": (low, high), "p": p}
    return results


def score_orders(rows: list[tuple]) -> dict:
    """How the order of the options affects accuracy, from rows answered in several orders (--orders).

    Entry k of a row's order_outputs is the answer with the options moved up by k places. Returns
    {"option_order": ...}; {} if no row has such answers. A row that could not be read is left out.
    """
    means = []  # accuracy of each question over its orders
    alike = []
    by_place = defaultdict(list)  # place of the right option, counted from 1
    orders = 0
    for row, location in rows:
        outputs = row.get("order_outputs") if isinstance(row, dict) else None
        if not outputs or None in outputs or not has_answer(row):
            continue
        answer, choices = answer_and_choices(row, location)
        texts = [choice.strip() for choice in choices]
        marks = [mmau_match(output, answer, choices) for output in outputs]
        orders = max(orders, len(outputs))
        means.append(sum(marks) / len(marks))
        alike.append(len(set(outputs)) == 1)
        if answer.strip() in texts:
            for shift, mark in enumerate(marks):
                place = (texts.index(answer.strip()) - shift) % len(choices) + 1
                by_place[place].append(mark)
    if not means:
        return {}
    results = {
        "orders": orders,
        "total": len(means),
        "accuracy": sum(means) / len(means),
        "interval": mean_interval(means),
        "alike": sum(alike) / len(alike),
        "by_place": {str(place): tally(marks) for place, marks in sorted(by_place.items())},
    }
    return {"option_order": results}


def with_prediction(row: dict, text: str) -> dict:
    """The row with another prediction."""
    return row | {"model_output": text, "model_prediction": text}


def tally(marks: list[bool]) -> dict:
    """Accuracy with its interval; None if there are no marks."""
    correct = sum(marks)
    total = len(marks)
    accuracy = correct / total if total else None
    interval = wilson_interval(correct, total) if total else None
    return {"accuracy": accuracy, "interval": interval, "correct": correct, "total": total}


def by_group(rows: list[dict], values: list) -> dict[str, dict[str, list]]:
    """The values, one per row, as {key: {value of that key: [...]}}; None is left out."""
    groups = {key: defaultdict(list) for key in GROUPS}
    for row, value in zip(rows, values, strict=True):
        for key in GROUPS:
            if value is not None and key in row:
                groups[key][str(row[key])].append(value)
    return {key: dict(sorted(group.items())) for key, group in groups.items()}


# ---------------------------------------------------------------- uncertainty of an accuracy

Z = 1.959964  # 95 % of a normal distribution lies within this many standard deviations


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of an accuracy (Wilson 1927)."""
    p = correct / total
    scale = 1 + Z * Z / total
    middle = (p + Z * Z / (2 * total)) / scale
    half = Z * math.sqrt(p * (1 - p) / total + (Z / (2 * total)) ** 2) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of a mean of values from 0 to 1, by normal approximation."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
    half = Z * math.sqrt(variance / n)
    return max(0.0, mean - half), min(1.0, mean + half)


def mcnemar_p(b: int, c: int) -> float:
    """Two-sided p-value if only one model is right on b rows, and only the other on c (McNemar 1947).

    Exact up to 1,000 such rows, then the normal approximation with continuity correction (Edwards 1948).
    """
    if b + c > 1000:
        z = max(0, abs(b - c) - 1) / math.sqrt(b + c)
        return math.erfc(z / math.sqrt(2))
    return min(1.0, 2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c))


def paired_difference(pairs: list[tuple[bool, bool]]) -> tuple[float, float, float, float]:
    """Second minus first accuracy, its 95 % interval (Bonett and Price 2012), and McNemar's p-value."""
    n = len(pairs)
    b = sum(second and not first for first, second in pairs)
    c = sum(first and not second for first, second in pairs)
    p = (b + 1) / (n + 2)
    q = (c + 1) / (n + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return (b - c) / n, max(-1.0, p - q - half), min(1.0, p - q + half), mcnemar_p(b, c)
