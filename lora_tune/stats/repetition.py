"""Whether answers have collapsed: empty, the same to every prompt, or one phrase over and over.

Greedy decoding without any penalty shows such faults best, and that is how samples are written. An untuned
base often repeats itself as well: whoever blames the tuning must judge the base by the same functions.
"""

from collections.abc import Sequence

# Characters of a phrase: about four English words, the length of seq-rep-4. Counted in characters, scripts
# that set no spaces are judged alike.
PHRASE_CHARACTERS = 20
# Of an answer, in phrases written before. A loop of 25 words in an answer of 50 words is half; answers of an
# untuned 135M model that a person calls a loop had 0.46 to 0.73, the worst of 1,000 docstrings 0.07.
REPEATED_SHARE = 0.5
DIFFERENT_SHARE = 0.75  # of the references, before equal answers are a fault
# Of the answers. One odd answer of five is no collapse, most of them are.
COLLAPSED_SHARE = 0.5


def repeated_share(text: str) -> float:
    """Return which share of a text's phrases stood in it before, from 0 to 1.

    1 - (distinct phrases) / (phrases), a phrase being every run of ``PHRASE_CHARACTERS`` characters,
    whitespace counted as one space. 0 for texts that are no longer than a phrase.

    Source: seq-rep-n of Welleck et al. 2020, Neural Text Generation with Unlikelihood Training
    (arXiv 1908.04319), section 6, there of n tokens.

    >>> repeated_share("The cat sat on the mat and looked at the rain outside the window.")
    0.0
    >>> round(repeated_share("the end of the story is " * 6), 2)
    0.81
    """
    plain = " ".join(text.split())
    count = len(plain) - PHRASE_CHARACTERS + 1
    if count < 2:
        return 0.0
    return 1 - len({plain[i : i + PHRASE_CHARACTERS] for i in range(count)}) / count


def collapse_reason(answers: Sequence[str], references: Sequence[str]) -> str | None:
    """Return what is wrong with answers to different prompts, as a part of a sentence; None: nothing is.

    Answers are compared with the references of their own prompts, so data that ask for empty or uniform
    answers are not held against a model. The answers have collapsed when more than half of them

    - are empty where the reference is not,
    - repeat themselves (``REPEATED_SHARE`` and more of their phrases) where the reference does not,

    or when all of them are the same although at least three in four references differ from each other: with
    two labels that occur again and again, the same answer to five prompts is nothing strange.

    Args:
        answers: Texts as written.
        references: Texts of the data, one an answer.

    >>> collapse_reason(["", " ", "Yes."], ["No.", "Yes.", "Yes."])
    '2 of 3 answers are empty'
    >>> collapse_reason(["I do not know."] * 3, ["Paris", "Rome", "Oslo"])
    'all 3 answers are the same'
    >>> collapse_reason(["good"] * 4, ["good", "bad", "good", "good"]) is None
    True
    """
    pairs = [
        (a.strip(), reference.strip()) for a, reference in zip(answers, references, strict=True)
    ]
    empty = sum(not answer and bool(reference) for answer, reference in pairs)
    if empty > COLLAPSED_SHARE * len(pairs):
        return f"{empty} of {len(pairs)} answers are empty"
    if _all_the_same([answer for answer, _ in pairs], [reference for _, reference in pairs]):
        return f"all {len(pairs)} answers are the same"
    looping = sum(
        repeated_share(reference) < REPEATED_SHARE <= repeated_share(answer)
        for answer, reference in pairs
    )
    if looping > COLLAPSED_SHARE * len(pairs):
        return f"{looping} of {len(pairs)} answers repeat themselves"
    return None


def _all_the_same(answers: Sequence[str], references: Sequence[str]) -> bool:
    differ = len(set(references)) >= DIFFERENT_SHARE * len(references)
    return len(answers) > 1 and len(set(answers)) == 1 and differ
