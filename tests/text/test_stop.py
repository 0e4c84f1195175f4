"""Stop strings against a naive search of the whole text, over every way to split it."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.text.stop import StopMatch, StopMatcher


def naive(text: str, stop_strings: list[str], include: bool) -> tuple[str, str | None]:
    """Grow the text by one character until it ends with a stop string; the longest such one."""
    for end in range(1, len(text) + 1):
        found = [string for string in stop_strings if text[:end].endswith(string)]
        if found:
            matched = max(found, key=len)
            return text[: end if include else end - len(matched)], matched
    return text, None


def feed(matcher: StopMatcher, pieces: list[str]) -> tuple[str, str | None]:
    shown = ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        shown += text
        if matched is not None:
            return shown, matched
    return shown + matcher.finish(), None


small = st.text(alphabet="ab\n", max_size=24)


@settings(max_examples=600, deadline=None)
@given(
    text=small,
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=6), max_size=4),
    cuts=st.lists(st.integers(0, 24), max_size=6),
    include=st.booleans(),
)
def test_equals_the_naive_search_for_any_split(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert feed(StopMatcher(stops, include), pieces) == naive(text, stops, include)


@settings(max_examples=300, deadline=None)
@given(text=small, stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_holds_back_only_what_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    known, shown = "", ""
    for character in text:
        piece, matched = matcher.push(character)
        if matched is not None:
            return
        known, shown = known + character, shown + piece
        held = known[len(shown) :]
        longest = max((n for n in range(7) if any(known.endswith(s[:n]) for s in stops if n < len(s))), default=0)
        assert len(held) == longest


@pytest.mark.parametrize(
    ("pieces", "stops", "include", "expected"),
    [
        (["Hello\nUs", "er: no"], ["\nUser:"], False, ("Hello", "\nUser:")),
        (["Hello\nUs", "er: no"], ["\nUser:"], True, ("Hello\nUser:", "\nUser:")),
        (["xabcd"], ["abcd", "bc"], False, ("xa", "bc")),
        (["abc"], ["c", "bc"], False, ("a", "bc")),
        (["aaab"], ["aab"], False, ("a", "aab")),
        (["naïve 😀", " end"], ["😀 e"], False, ("naïve ", "😀 e")),
        (["nothing"], [], False, ("nothing", None)),
        (["almost EN"], ["END"], False, ("almost EN", None)),
    ],
)
def test_cases(pieces: list[str], stops: list[str], include: bool, expected: tuple[str, str | None]) -> None:
    assert feed(StopMatcher(stops, include), pieces) == expected


def test_matches_are_passed_over_until_they_may_match() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.push("abxa", can_match=False) == StopMatch("abx", None)
    assert matcher.push("b") == StopMatch("", "ab")
    overlapping = StopMatcher(["aa"])
    assert overlapping.push("aa", can_match=False) == StopMatch("a", None)
    assert overlapping.push("a") == StopMatch("", "aa")


def test_a_hostile_string_costs_no_more_than_linear_work() -> None:
    """aaaa…b against aaaa…: quadratic for a search that starts anew at each character."""
    matcher = StopMatcher(["a" * 255 + "b"] * 16)
    shown = "".join(matcher.push("a" * 1_000).text for _ in range(20))
    assert len(shown) == 20_000 - 255
