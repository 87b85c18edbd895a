"""A log record is one line of JSON that no event can forge."""

import io
import json
import logging
import sys
import urllib.request
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contracts.settings import ConfigurationError
from streams.telemetry import MAX_FIELD, JsonFormatter, MetricsServer, configure_logging, now_ms


def formatted(message: str, *args: Any, exc_info: Any = None, **extra: Any) -> str:
    record = logging.LogRecord("streams.x", logging.WARNING, __file__, 1, message, args, exc_info)
    vars(record).update(extra)
    return JsonFormatter().format(record)


def test_line_says_time_level_logger_message_and_extra() -> None:
    line = json.loads(formatted("late click", impression_id="i1", late_by_ms=7, ratio=0.5, ok=True, none=None))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "WARNING",
        "logger": "streams.x",
        "message": "late click",
        "impression_id": "i1",
        "late_by_ms": 7,
        "ratio": 0.5,
        "ok": True,
        "none": None,
    }


HOSTILE = 'a\nb\r\x1b[31mred\x1b[0m\x00\x7f\x85\u2028\u2029\u202e\ud800"}'


def test_control_characters_are_escaped_wherever_they_come() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        info = sys.exc_info()
    text = formatted("saw %s", HOSTILE, exc_info=info, value=HOSTILE, nested={HOSTILE: HOSTILE}, items=[HOSTILE])
    assert text.isascii()
    assert text.replace("\x7f", "").isprintable()
    assert "\x1b" not in text
    assert len(text.splitlines()) == 1
    line = json.loads(text)
    assert line["value"] == HOSTILE
    assert line["nested"] == {HOSTILE: HOSTILE}
    assert "ValueError" in line["exception"]


@given(st.text(), st.text(min_size=1).map(lambda name: "x_" + name), st.text())
def test_any_text_stays_one_line_of_json(message: str, name: str, value: str) -> None:
    text = formatted("%s", message, **{name: value})
    assert len(text.splitlines()) == 1
    line = json.loads(text)
    assert line["level"] == "WARNING"
    assert line["message"] == message


def test_long_values_are_cut_and_say_how_long_they_were() -> None:
    long = "x" * 100_000
    try:
        raise ValueError(long)
    except ValueError:
        info = sys.exc_info()
    text = formatted(
        long, exc_info=info, a=long, b=[long], c={"k": long}, d=dict.fromkeys(map(str, range(1000)), 1), e=b"y" * 9999
    )
    line = json.loads(text)
    assert line["a"] == "x" * MAX_FIELD + "... (100000 characters)"
    assert line["message"] == "x" * 4 * MAX_FIELD + "... (100000 characters)"
    assert len(line["b"]) < MAX_FIELD + 50
    assert len(line["c"]["k"]) < MAX_FIELD + 50
    assert len(line["d"]) == 64
    assert len(line["exception"]) < 33 * MAX_FIELD
    assert len(text) < 60 * MAX_FIELD


def test_value_of_the_limit_is_not_cut() -> None:
    assert json.loads(formatted("m", a="x" * MAX_FIELD))["a"] == "x" * MAX_FIELD


def test_long_key_of_a_mapping_is_cut() -> None:
    (key,) = json.loads(formatted("m", a={"k" * 5000: 1}))["a"]
    assert len(key) <= MAX_FIELD + 50


def test_exception_is_in_the_line() -> None:
    try:
        int("x")
    except ValueError:
        text = formatted("failed", exc_info=sys.exc_info())
    assert "invalid literal for int()" in json.loads(text)["exception"]


@pytest.fixture
def _logging_as_before() -> Any:
    root = logging.getLogger()
    noisy = {name: logging.getLogger(name).level for name in ("kafka", "aiokafka", "faust", "mode", "httpx")}
    handlers, level = root.handlers[:], root.level
    # `force` closes the handlers that it removes; those of pytest must survive.
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in noisy.items():
        logging.getLogger(name).setLevel(before)


@pytest.mark.usefixtures("_logging_as_before")
def test_configured_loggers_write_json_to_stderr_from_their_level_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logging("INFO")
    logging.getLogger("a").debug("no")
    logging.getLogger("a").info("yes", extra={"n": 1})
    logging.getLogger("kafka.conn").info("a connection")
    logging.getLogger("kafka.conn").warning("a broken one")
    lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    assert [(line["logger"], line["message"]) for line in lines] == [("a", "yes"), ("kafka.conn", "a broken one")]
    assert lines[0]["n"] == 1


def test_metrics_server_shows_metrics_until_it_is_closed() -> None:
    server = MetricsServer("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
            assert b"python_info" in answer.read()
        with pytest.raises(ConfigurationError, match=r"in use.*GENCO_METRICS_PORT"):
            MetricsServer("127.0.0.1", server.port)
    finally:
        server.close()
    MetricsServer("127.0.0.1", server.port).close()


def test_wall_clock_is_in_milliseconds() -> None:
    assert 1_700_000_000_000 < now_ms() < 4_102_444_800_000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_number_that_is_not_finite_is_json_too(value: float) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(formatted("m", loss=value), parse_constant=refuse)
