"""Decision ids carry their route and time, and nobody else can make one."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streams.contracts.decision_ids import (
    NUM_ROUTES,
    InvalidDecisionIdError,
    issued_at_ms,
    make_decision_id,
    route_of,
    verify_decision_id,
)

KEY = b"k" * 32
GOOD = make_decision_id(7, 1_764_000_000_123, 0x5D41, KEY)


@given(st.integers(0, NUM_ROUTES - 1), st.integers(0, 2**48 - 1), st.integers(0, 2**32 - 1))
def test_id_carries_route_and_time_and_verifies(route: int, now_ms: int, random_32: int) -> None:
    made = make_decision_id(route, now_ms, random_32, KEY)
    verify_decision_id(made, KEY)
    assert (route_of(made), issued_at_ms(made)) == (route, now_ms)
    assert len(made) <= 128


def test_id_has_the_documented_form_for_ever() -> None:
    # Ids live in logs: another form or MAC would refuse the clicks of yesterday's impressions.
    assert GOOD[:-16] == "7.019ab697e87b00005d41."
    assert make_decision_id(7, 1_764_000_000_123, 0x5D41, KEY) == GOOD
    assert GOOD[-16:] == "9c888ce8b1859497"


@given(st.integers(0, 2**48 - 2), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_ids_of_a_route_sort_by_time(now_ms: int, first: int, second: int) -> None:
    assert make_decision_id(3, now_ms, first, KEY) < make_decision_id(3, now_ms + 1, second, KEY)


def test_ids_differ_in_each_argument() -> None:
    base = (7, 1000, 5)
    made = {make_decision_id(*args, KEY) for args in (base, (8, 1000, 5), (7, 1001, 5), (7, 1000, 6))}
    assert len(made) == 4


def test_id_of_another_key_is_refused() -> None:
    with pytest.raises(InvalidDecisionIdError, match="was not issued here"):
        verify_decision_id(GOOD, b"j" * 32)


@given(st.integers(0, len(GOOD) - 1), st.sampled_from("0123456789abcdefg.:é"))
def test_id_with_one_other_character_is_refused(at: int, character: str) -> None:
    assume(GOOD[at] != character)
    with pytest.raises(InvalidDecisionIdError):
        verify_decision_id(GOOD[:at] + character + GOOD[at + 1 :], KEY)


@pytest.mark.parametrize(
    "forged",
    [
        "",
        ".",
        "..",
        "7",
        "7.",
        GOOD.upper(),
        GOOD + "0",
        GOOD[:-1],
        GOOD.rpartition(".")[0],
        GOOD.rpartition(".")[0] + ".",
        "0" + GOOD,
        " " + GOOD,
        GOOD + "\n",
        GOOD + ".x",
        "x" * 100_000,
    ],
)
def test_malformed_id_is_refused(forged: str) -> None:
    with pytest.raises(InvalidDecisionIdError):
        verify_decision_id(forged, KEY)


@given(st.text(max_size=60))
def test_any_text_is_refused_with_our_own_error(text: str) -> None:
    with pytest.raises(InvalidDecisionIdError):
        verify_decision_id(text, KEY)


@pytest.mark.parametrize("id_", ["", "x.y.z", "-1.a.b", "65536.a.b", "1e3.a.b", "٣.a.b", "999999999999.a.b", " 1.a.b"])
def test_id_without_route_is_refused(id_: str) -> None:
    with pytest.raises(InvalidDecisionIdError, match="has no route"):
        route_of(id_)


def test_route_may_be_anything_below_its_number() -> None:
    assert route_of("0.a.b") == 0
    assert route_of("65535.a.b") == 65535
    assert route_of("12") == 12


@pytest.mark.parametrize("id_", ["", "1", "1.2.3", "1.0192f3c4a5b67c8d9e0f", "1.zzzzzzzzzzzz7c8d9e0f.x", f"{GOOD}.x"])
def test_time_of_a_malformed_id_is_refused(id_: str) -> None:
    with pytest.raises(InvalidDecisionIdError, match="malformed"):
        issued_at_ms(id_)


def test_message_of_a_hostile_id_is_short() -> None:
    for check in (route_of, issued_at_ms, lambda text: verify_decision_id(text, KEY)):
        with pytest.raises(InvalidDecisionIdError) as error:
            check("\x1b[31m\n" * 10_000)
        assert len(str(error.value)) < 500
        assert str(error.value).isprintable()


@pytest.mark.parametrize("forged", ["7.0192f3c4a5b67c8d9e0\ud800.0", "7.0192f3c4a5b67c8d9e0f.\ud800"])
def test_id_with_a_lone_surrogate_is_refused_with_our_own_error(forged: str) -> None:
    with pytest.raises(InvalidDecisionIdError):
        verify_decision_id(forged, KEY)
