"""From a generated text to an answer: yes or no, a letter, a word."""

import pytest

from megatron_ext.evaluation.parsing import letter, normalised, yes_or_no


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        (" No.", "no"),
        ("Yes, there is no dog behind it", "yes"),
        ("No, yes is wrong", "no"),
        ("The answer is yes.", "yes"),
        ("There is no dog", "no"),
        ("There is no dog, yes", None),
        ("I do not know", None),
        ("yesterday", None),
        ("none", None),
        ("Noon", None),
        ("", None),
        ("...", None),
    ],
)
def test_yes_or_no_is_the_first_word_or_the_only_one_of_the_two(text, expected):
    assert yes_or_no(text) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A", "A"),
        ("b.", "B"),
        ("(C)", "C"),
        (" **D** ", "D"),
        ("A: Two", "A"),
        ("(B) something else", "B"),
        ("C. a red house", "C"),
        ("D a dog", "D"),
        ("a dog", "D"),
        ("A red house.", "C"),
        ("2", "A"),
        ("A cat", None),
        ("A and B", None),
        ("A, B", None),
        ("E", None),
        ("the answer", None),
        ("", None),
    ],
)
def test_a_letter_or_an_options_own_text_names_the_option(text, named):
    assert letter(text, ("Two", "Blue", "The red house", "Dog")) == named


def test_the_text_of_two_options_names_neither():
    assert letter("dog", ("a dog", "the dog", "cat", "cow")) is None
    assert letter("B. the dog", ("a dog", "the dog", "cat", "cow")) == "B"


def test_a_letter_is_the_letter_even_where_it_is_another_options_text():
    assert letter("B", ("B", "A", "D", "C")) == "B"


@pytest.mark.parametrize(
    ("first", "second"),
    [("The  T-shirt.", "t shirt"), ("two dogs", "2 Dogs"), ("women's", "womens"), ("An apple!", "apple")],
)
def test_answers_that_differ_in_form_alone_are_equal_once_normalised(first, second):
    assert normalised(first) == normalised(second)


def test_normalising_keeps_what_distinguishes_answers():
    answers = ["left", "right", "no", "t shirt", "shirt", "1", "2", "there", "北京"]
    assert len({normalised(answer) for answer in answers}) == len(answers)
