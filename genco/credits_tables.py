"""The tables of `genco credits`: what is known in numbers, and what is not known in words.

Ids come from strangers: they are shown as plain text, with what is no printable character escaped.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from genco.dead_letters import printable
from serving.explanation import CardCredits, ElementCredit, PairCredit, SlotCredits, Taste, Uplift, Verdict

WORDS: Final[dict[Verdict, tuple[str, str]]] = {
    "better": ("better", "green"),
    "worse": ("worse", "red"),
    "average": ("about average", ""),
    "unclear": ("not known yet", "dim"),
    "unknown": ("never seen by the model", "dim"),
}
"""Verdict -> how it is put, and its style."""
_MOST_SHOWN: Final = 9.99


def show(found: CardCredits, console: Console | None = None) -> None:
    """Print an explanation."""
    console = console or Console()
    explanation, snapshot = found.explanation, found.snapshot
    moment = datetime.fromtimestamp(snapshot.max_event_time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    console.print(
        _text(
            f"product {explanation.product_id} under model {snapshot.model_id}, epoch {snapshot.epoch}, version "
            f"{snapshot.version}, which has learned impressions up to {moment}"
        )
    )
    if not explanation.product_known:
        console.print(_text("The snapshot does not know this product; what it knows of the elements counts."))
    if found.candidates_from == "snapshot":
        console.print(
            _text(
                "The catalog has no card of this product (or was not asked: GENCO_KAFKA_BOOTSTRAP_SERVERS), so every "
                "element of the snapshot counts as a candidate; --candidates FILE says which ones the card has."
            )
        )
    given = ", ".join(f"{name}={value}" for name, value in explanation.context.items()) or "everyone"
    over = f" (averaged over {', '.join(explanation.averaged_over)})" if explanation.averaged_over else ""
    console.print(_text(f"for {given}{over}"))
    for slot in explanation.slots:
        console.print(slot_table(slot))
    console.print(
        _text("clicks: against the slot's average candidate, the other slots as they are played now; 90 % intervals")
    )
    _section(
        console,
        "For whom: where a candidate differs clearly from what it does on the whole",
        [_taste_line(taste) for taste in explanation.tastes],
        _no_tastes(found),
    )
    clear = [pair for pair in (*explanation.good_pairs, *explanation.bad_pairs) if _is_clear(pair.effect)]
    _section(
        console,
        "Pairs that do better or worse together than their parts",
        [_pair_line(pair) for pair in clear],
        "no pair is known to do so yet",
    )


def slot_table(slot: SlotCredits) -> Table:
    """Return the table of a slot."""
    table = Table(title=_text(slot.slot), title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("candidate")
    for name in ("shown", "clicks", "90 % interval", "best"):
        table.add_column(name, justify="right")
    table.add_column("", justify="left")
    for element in slot.elements:
        table.add_row(*_row(element))
    return table


def _row(element: ElementCredit) -> tuple[Text, ...]:
    word, style = WORDS[element.uplift.verdict]
    numbers = percent(element.uplift.clicks), interval(element.uplift), f"{element.best:.0%}"
    if element.uplift.verdict == "unknown":
        numbers = "", "", ""
    cells = (_text(element.element_id), Text(f"{element.share:.1%}"), *(Text(number) for number in numbers))
    return (*cells, Text(word, style))


def percent(ratio: float) -> str:
    """Return a change of the click rate as people write it.

    Example:
        >>> percent(0.117), percent(-0.06), percent(12.0)
        ('+12 %', '-6 %', 'above +999 %')
    """
    return f"{ratio:+.0%}".replace("%", " %") if ratio < _MOST_SHOWN else f"above +{_MOST_SHOWN:.0%}".replace("%", " %")


def interval(uplift: Uplift) -> str:
    """Return an interval of changes of the click rate."""
    return f"{percent(uplift.clicks_low)} .. {percent(uplift.clicks_high)}"


def _taste_line(taste: Taste) -> Text:
    word, style = WORDS[taste.difference.verdict]
    line = _text(f"{taste.slot} {taste.element_id} for {taste.field}={taste.value}: ")
    return line.append(word, style).append(f", {percent(taste.difference.clicks)} ({interval(taste.difference)})")


def _pair_line(pair: PairCredit) -> Text:
    word, style = WORDS[pair.effect.verdict]
    (one, two), (first, second) = pair.slots, pair.element_ids
    line = _text(f"{one} {first} with {two} {second}: ")
    return line.append(word, style).append(f", {percent(pair.effect.clicks)} ({interval(pair.effect)})")


def _is_clear(effect: Uplift) -> bool:
    return effect.verdict in ("better", "worse")


def _no_tastes(found: CardCredits) -> str:
    if not found.explanation.contexts:
        return "the snapshot knows no further context"
    return "no difference between contexts is known yet"


def _section(console: Console, title: str, lines: Iterable[Text], otherwise: str) -> None:
    console.print()
    console.print(_text(title, "bold"))
    for line in list(lines) or [Text(otherwise, "dim")]:
        console.print(Text("  ").append_text(line))


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style)
