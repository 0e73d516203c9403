"""Parsing a model's free-form answer into one that can be compared."""

import re
from collections.abc import Sequence

LETTERS = "ABCD"
_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_FIRST_LETTER = re.compile(r"[\W_]*([A-Da-d])\b(.*)", re.DOTALL)


def normalised(text: str) -> str:
    """Normalise a short answer for comparison.

    Lower case; apostrophes removed, other punctuation replaced by a space; the articles a, an, the removed; number
    words from zero to twelve as digits; single spaces. ``"The  T-shirt."`` becomes ``"t shirt"``.
    """
    letters = re.sub(r"['’`]", "", text.lower())
    words = re.sub(r"[\W_]+", " ", letters).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def yes_or_no(text: str) -> str | None:
    """``"yes"`` or ``"no"`` if the answer says one of them, else None.

    A first word of yes or no decides, in any case and punctuation. Otherwise the answer says yes (no) if the word yes
    (no) occurs in it and the other does not. "not", "none" and "yeah" are other words.
    """
    words = _WORD.findall(text.lower())
    matches = [word for word in words if word in ("yes", "no")]
    if not matches or (words[0] != matches[0] and len(set(matches)) == 2):
        return None
    return matches[0]


def letter(text: str, choices: Sequence[str]) -> str | None:
    """The option A, B, C or D that the answer names, else None. The first rule that applies:

    1. the letter alone, in either case, with or without brackets and punctuation: ``A``, ``(a)``, ``A.``;
    2. the text of an option, compared :func:`normalised`, if exactly one option has it;
    3. the letter before a full stop, colon or closing bracket (``A: text``, ``(A) text``), or before a space and that
       option's text (``A text``). ``A dog`` does not name option A unless option A is "dog".
    """
    match = _FIRST_LETTER.fullmatch(text.strip())
    rest = match[2].strip() if match else ""
    if match and not _WORD.search(rest):
        return match[1].upper()
    options = [normalised(choice) for choice in choices]
    if options.count(normalised(text)) == 1 and normalised(text):
        return LETTERS[options.index(normalised(text))]
    if match and (rest[0] in ".:)]" or normalised(rest) == options[LETTERS.index(match[1].upper())]):
        return match[1].upper()
    return None
