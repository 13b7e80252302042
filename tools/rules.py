"""Score one file of predictions under several rules: the same answers get different scores, or none.

python -m tools.rules runs/eval/predictions.json
python -m tools.rules --table mmau-test-mini.json    # every answer right, written in four ways

An answer that a parser cannot read is counted as unparsed, and as wrong. What the harness itself would report
is shown next to that: lmms-eval guesses one of A to D at random, evalscope takes A.
"""

import argparse
import re
from dataclasses import dataclass

from cli import BadInput, run_main, say
from data import has_answer, read_rows
from rewards import answer_and_choices, judge, prediction_of, wilson_interval

LETTERS = "ABCD"  # those that both parsers know
ALL_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass
class Score:
    """The result of one rule for a file of predictions."""

    right: int
    total: int
    unparsed: int = 0
    published: float | None = None  # expected accuracy with the harness's own treatment of unparsed answers


# ---------------------------------------------------------------- rules


def lmms_eval_letter(text: str) -> str | None:
    """The letter that lmms-eval reads from an MMAU answer; None where it would guess one at random.

    Follows parse_multi_choice_response in lmms_eval/tasks/mmau/utils.py, commit a74c71f. "(B)" takes
    precedence over " B ", and that over "B."; of several letters it takes the one whose last " B " is nearest
    the end.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} ", "{}."):
        found = [letter for letter in LETTERS if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(f" {letter} "))
    return None


def evalscope_letter(text: str) -> str | None:
    """The letter that evalscope reads from an MMAU answer; None where it would take A.

    Follows _parse_choice in evalscope/benchmarks/mmau/mmau_adapter.py, commit 203cdc9: "ANSWER: B" in upper
    or lower case, else like lmms-eval.
    """
    match = re.search(r"answer\s*:\s*([a-d])", text, re.IGNORECASE)
    return match[1].upper() if match else lmms_eval_letter(text)


def is_right(letter: str | None, answer: str, choices: list[str]) -> bool:
    """Whether the option with this letter has the text of the answer, ignoring case."""
    if letter is None or LETTERS.index(letter) >= len(choices):
        return False
    choice = choices[LETTERS.index(letter)]
    return choice.strip().lower() == answer.strip().lower()


def score_rules(rows: list[tuple]) -> dict[str, Score]:
    """The score of (row, location) pairs under each rule. A row without an answer is left out."""
    mmau = Score(0, 0)
    exact = Score(0, 0)  # the training reward
    lmms_eval = Score(0, 0, published=0.0)
    evalscope = Score(0, 0, published=0.0)
    scores = {"MMAU": mmau, "exact option": exact, "lmms-eval": lmms_eval, "evalscope": evalscope}
    for row, location in rows:
        is_mmau_right = judge(row, location)
        if is_mmau_right is None:
            continue
        for part in scores.values():
            part.total += 1
        if not has_answer(row) or "unusable" in row:  # wrong under every rule
            continue
        answer, choices = answer_and_choices(row, location)
        text = (prediction_of(row) or "").strip()
        mmau.right += is_mmau_right
        exact.right += text == answer.strip()

        letter = lmms_eval_letter(text)
        lmms_eval.right += is_right(letter, answer, choices)
        lmms_eval.unparsed += letter is None
        guesses = LETTERS if letter is None else letter  # the mean over the four guesses
        right_guesses = sum(is_right(guess, answer, choices) for guess in guesses)
        lmms_eval.published += right_guesses / len(guesses)

        letter = evalscope_letter(text)
        evalscope.right += is_right(letter, answer, choices)
        evalscope.unparsed += letter is None
        evalscope.published += is_right(letter or "A", answer, choices)
    for part in (lmms_eval, evalscope):
        part.published /= max(1, mmau.total)
    return scores


# ---------------------------------------------------------------- printing


def show_rules(path: str) -> None:
    """Print the accuracy of a file of predictions under each rule."""
    rows, _ = read_rows(path)
    scores = score_rules(rows)
    if not scores["MMAU"].total:
        raise BadInput(f"{path}: has no answers to compare with")
    if all(prediction_of(row) is None for row, _ in rows):
        raise BadInput(f"{path}: no row has a prediction (key 'model_output' or 'model_prediction')")
    say(f"{'rule':<14}accuracy   95 % interval   unparsed   as its harness reports it")
    for name, part in scores.items():
        low, high = wilson_interval(part.right, part.total)
        line = f"{name:<14}{part.right / part.total:8.1%}   {100 * low:5.1f} to {100 * high:5.1f}"
        if part.published is not None:
            line += f"   {part.unparsed / part.total:8.1%}   {part.published:.1%}"
        say(line)
    say(f"{scores['MMAU'].total} rows of {path}")


FORMS = {
    "the option's text": "{text}",
    "a bare letter": "{letter}",
    "(B) text": "({letter}) {text}",
    "B. text": "{letter}. {text}",
}


def show_table(path: str) -> None:
    """Print, in Markdown, how each rule scores the right answers to these questions, written in four ways."""
    questions, _ = read_rows(path)
    say(f"| right answers, written as | {' | '.join(score_rules([]))} |")
    say("| --- | --- | --- | --- | --- |")
    for name, form in FORMS.items():
        rows = []
        for row, location in questions:
            judge(row, location)  # refuses anything but a question
            if not has_answer(row):
                continue
            answer, choices = answer_and_choices(row, location)
            texts = [choice.strip() for choice in choices]
            if answer.strip() not in texts:
                raise BadInput(f"{location}: the answer is not among the options, so it has no letter")
            letter = ALL_LETTERS[texts.index(answer.strip())]
            prediction = form.format(letter=letter, text=answer)
            rows.append((row | {"model_output": prediction, "model_prediction": prediction}, location))
        if not rows:
            raise BadInput(f"{path}: has no answers")
        cells = [name]
        for part in score_rules(rows).values():
            cell = f"{100 * part.right / part.total:.1f}"
            if part.unparsed:
                unparsed = f"{100 * part.unparsed / part.total:.1f} unparsed"
                cell += f" ({unparsed}; reported as {100 * part.published:.1f})"
            cells.append(cell)
        say(f"| {' | '.join(cells)} |")


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.rules", description=__doc__, formatter_class=kind)
    parser.add_argument("file", help="predictions; with --table, questions")
    parser.add_argument("--table", action="store_true", help="the same right answers, written in four ways")
    flags = parser.parse_args()
    if flags.table:
        show_table(flags.file)
    else:
        show_rules(flags.file)


if __name__ == "__main__":
    run_main(main)
