"""From what a model wrote to an answer that can be compared."""

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
    """A short answer without what does not distinguish answers, to be compared with another one.

    Lower case; apostrophes dropped, other punctuation replaced by a space; the articles a, an, the dropped; number
    words from zero to twelve written as digits; single spaces. ``"The  T-shirt."`` becomes ``"t shirt"``.
    """
    letters = re.sub(r"['’`]", "", text.lower())
    words = re.sub(r"[\W_]+", " ", letters).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def yes_or_no(text: str) -> str | None:
    """``"yes"`` or ``"no"`` where the answer says one of them, else None.

    The first word decides where it is yes or no, in whatever case and punctuation. Otherwise the answer says yes (no)
    where the word yes (no) occurs in it and the other does not. "not", "none", "yeah" are other words.
    """
    words = _WORD.findall(text.lower())
    said = [word for word in words if word in ("yes", "no")]
    if not said or (words[0] != said[0] and len(set(said)) == 2):
        return None
    return said[0]


def letter(text: str, choices: Sequence[str]) -> str | None:
    """Which of the options A, B, C, D the answer names, else None. The first that applies:

    1. the letter alone, in either case, brackets and punctuation around it aside: ``A``, ``(a)``, ``A.``;
    2. an option's own text, compared :func:`normalised`, where one option alone has it;
    3. the letter before a full stop, colon or closing bracket (``A: text``, ``(A) text``), or before a space and that
       option's own text (``A text``). ``A dog`` does not name option A unless option A is "dog".
    """
    found = _FIRST_LETTER.fullmatch(text.strip())
    rest = found[2].strip() if found else ""
    if found and not _WORD.search(rest):
        return found[1].upper()
    options = [normalised(choice) for choice in choices]
    if options.count(normalised(text)) == 1 and normalised(text):
        return LETTERS[options.index(normalised(text))]
    if found and (rest[0] in ".:)]" or normalised(rest) == options[LETTERS.index(found[1].upper())]):
        return found[1].upper()
    return None
