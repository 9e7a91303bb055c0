"""A wrong field is an error that names it; a right one is what it is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmstate.errors import CannotDo, Damaged, VmstateError
from vmstate.fields import Fields, objects_of

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


def of(value: Any) -> Fields:
    return Fields({"x": value}, "an answer")


def test_what_is_right_comes_back() -> None:
    fields = Fields(
        {"t": "a", "n": 3, "f": True, "r": 1.5, "i": {"n": 1}, "l": [{"n": 2}], "s": ["a", "b"]}, "an answer"
    )
    assert (fields.text("t"), fields.whole("n"), fields.flag("f"), fields.number("r")) == ("a", 3, True, 1.5)
    assert fields.inner("i").whole("n") == 1
    assert fields.choice("t", ("b", "a")) == "a"
    assert [one.whole("n") for one in fields.objects("l")] == [2]
    assert fields.texts("s") == ["a", "b"]
    assert Fields({"w": [1, 2]}, "an answer").wholes("w") == [1, 2]
    assert "t" in fields
    assert "z" not in fields


def test_what_is_not_there_has_its_default() -> None:
    fields = Fields({}, "an answer")
    assert fields.text("x", None) is None
    assert fields.whole("x", 7) == 7
    assert fields.objects("x") == []
    assert fields.texts("x") == []
    assert fields.inner("x", None) is None


@pytest.mark.parametrize(
    ("read", "value", "words"),
    [
        (lambda f: f.text("x"), 3, "expected a text, found 3"),
        (lambda f: f.text("x", most=2), "abc", "expected at most 2 letters, found 'abc'"),
        (lambda f: f.text("x", pattern="[0-9]+"), "a", "expected a text like [0-9]+, found 'a'"),
        (lambda f: f.choice("x", ("a", "b")), "c", "expected 'a' or 'b', found 'c'"),
        (lambda f: f.whole("x"), True, "expected a whole number, found True"),
        (lambda f: f.whole("x"), 1.0, "expected a whole number, found 1.0"),
        (lambda f: f.whole("x"), -1, "expected a number from 0 to 9223372036854775807, found -1"),
        (lambda f: f.whole("x"), 1 << 63, "expected a number from 0 to 9223372036854775807"),
        (lambda f: f.flag("x"), 1, "expected true or false, found 1"),
        (lambda f: f.number("x"), "1", "expected a number, found '1'"),
        (lambda f: f.number("x"), float("nan"), "expected a number, found nan"),
        (lambda f: f.number("x"), float("inf"), "expected a number, found inf"),
        (lambda f: f.inner("x"), [], "expected an object, found []"),
        (lambda f: f.objects("x"), {}, "expected a list, found {}"),
        (lambda f: f.objects("x", most=1), [{}, {}], "expected at most 1 entries"),
        (lambda f: f.texts("x"), ["a", 1], "expected a list of texts"),
        (lambda f: f.wholes("x"), [1, True], "expected a list of numbers from 0 to"),
        (lambda f: f.wholes("x", high=9), [10], "expected a list of numbers from 0 to 9, found [10]"),
        (lambda f: f.texts("x", longest=2), ["abc"], "expected a list of texts of at most 2 letters"),
    ],
)
def test_a_wrong_one_is_named(read: Any, value: Any, words: str) -> None:
    with pytest.raises(CannotDo) as found:
        read(of(value))
    assert str(found.value).startswith("an answer: field 'x")
    assert words in str(found.value)


def test_one_that_is_missing_is_named() -> None:
    with pytest.raises(CannotDo, match="an answer: field 'x': expected a value, found none"):
        Fields({}, "an answer").whole("x")


def test_one_within_another_is_named_with_its_way() -> None:
    with pytest.raises(Damaged, match=r"a file: field 'a\[1\]\.b\.c': expected a text, found 3"):
        Fields({"a": [{}, {"b": {"c": 3}}]}, "a file", Damaged).objects("a")[1].inner("b").text("c")
    with pytest.raises(Damaged, match=r"a file: field 'a\[0\]': expected an object, found 3"):
        Fields({"a": [3]}, "a file", Damaged).objects("a")


def test_a_list_by_itself() -> None:
    assert [one.whole("n") for one in objects_of([{"n": 1}], "an answer")] == [1]
    with pytest.raises(CannotDo, match="an answer: field 'return': expected a list, found None"):
        objects_of(None, "an answer")


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(CannotDo) as found:
        of("x" * 5000).text("x")
    assert len(str(found.value)) < 150


@given(ANYTHING)
def test_whatever_comes_is_read_or_refused(value: Any) -> None:
    for kind in ("text", "whole", "flag", "number", "inner", "objects", "texts", "wholes"):
        try:
            getattr(of(value), kind)("x")
        except VmstateError as error:
            assert "field 'x" in str(error)
