"""What `genco policy` prints: tables and sentences.

Names and reasons come from strangers: they are shown as plain text, with what is no printable character escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from genco.dead_letters import printable, time_text
from streams.contracts.control import AuditRecord, RegistryState
from streams.contracts.registry import Version
from streams.contracts.snapshot import SnapshotManifest

if TYPE_CHECKING:
    from streams.registry import Registry
    from streams.registry_actions import Change

SHA_CHARACTERS: Final = 12
SHOWN_METRICS: Final = ("log_loss", "normalized_entropy", "calibration")
_REASON_CHARACTERS: Final = 80
HINTS: Final = {
    "pin": "Publications are stored and not served until: genco policy unpin",
    "freeze": "Publications are stored and not served until: genco policy unfreeze",
    "unpin": "The pointer stays until the next publication.",
    "unfreeze": "The pointer stays until the next publication.",
    "freeze-learning": "The learner waits until: genco policy unfreeze-learning",
    "unfreeze-learning": "The learner goes on where it stopped.",
    "explore": "Servers follow within a second; as ever again: genco policy explore 1",
    "accept-clicks": "The joiner's holds that began before this end; it learns the click rate anew.",
}


def listing(registry: Registry, limit: int) -> dict[str, Any]:
    """Return the registry as JSON can hold it: its state, its newest versions, the newest actions."""
    state, candidate = registry.state(), registry.candidate()
    versions = registry.history()
    kept = [v for v in (state.pinned, state.current) if v is not None]
    chosen = versions[:limit] + sorted({v for v in kept if v not in versions[:limit]}, reverse=True)
    manifests = registry.manifests(chosen)
    rows = [_row(version, manifests[version], marks(version, state)) for version in chosen]
    if candidate is not None and not candidate.gate.accepted:
        rows.insert(0, _row(Version(candidate.epoch, candidate.version), candidate, ["refused"]))
    return {
        "model_id": registry.model_id,
        "state": state.model_dump(mode="json"),
        "stored": len(versions),
        "versions": rows,
        "audit": [record.model_dump(mode="json") for record in registry.audit(limit)],
    }


def marks(version: Version, state: RegistryState) -> list[str]:
    """Return what is special about a version."""
    is_current = state.current == version
    found = ["current"] if is_current else []
    if state.pinned == version:
        found.append("pinned")
    return [*found, "frozen"] if is_current and state.frozen else found


def _row(version: Version, manifest: SnapshotManifest | None, marked: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"version": str(version), "marks": marked, "stored": manifest is not None}
    if manifest is None:
        return row
    return row | {
        "created_at_ms": manifest.created_at_ms,
        "gate": manifest.gate.model_dump(mode="json", include={"accepted", "reasons"}),
        "sha256": manifest.sha256,
        "num_bytes": manifest.num_bytes,
        "metrics": {name: manifest.metrics.get(name) for name in SHOWN_METRICS},
    }


def show_listing(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `listing` found."""
    console = console or Console()
    state = RegistryState.model_validate(found["state"])
    console.print(_text(f"model {found['model_id']}: {describe(state)}; {found['stored']} versions stored"))
    table = _table("version", "", "made", "gate", "sha256", "KiB", *(name.replace("_", " ") for name in SHOWN_METRICS))
    for row in found["versions"]:
        table.add_row(*map(_text, _cells(row)))
    if found["versions"]:
        console.print(table)
    if found["audit"]:
        console.print(_text("actions, newest first"))
        for fields in found["audit"]:
            console.print(_text(audit_line(AuditRecord.model_validate(fields))))


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    yield row["version"]
    yield ", ".join(row["marks"])
    if not row["stored"]:
        yield "not in Redis"
        return
    gate = row["gate"]
    yield time_text(row["created_at_ms"])
    yield "accepted" if gate["accepted"] else f"refused: {'; '.join(gate['reasons'])}"
    yield row["sha256"][:SHA_CHARACTERS]
    yield f"{row['num_bytes'] / 1024:,.0f}"
    yield from (number(row["metrics"][name]) for name in SHOWN_METRICS)


def show_manifest(manifest: SnapshotManifest, state: RegistryState, console: Console | None = None) -> None:
    """Print the manifest of a version."""
    console = console or Console()
    version = Version(manifest.epoch, manifest.version)
    marked = ", ".join(marks(version, state)) or "stored"
    console.print(_text(f"model {manifest.model_id}, version {version}: {marked}"))
    through = ", ".join(f"{partition}: {offset}" for partition, offset in sorted(manifest.trained_through.items()))
    fields = {
        "made": time_text(manifest.created_at_ms),
        "newest impression": time_text(manifest.max_event_time_ms),
        "learned up to": through or "-",
        "sha256": manifest.sha256,
        "parent": manifest.parent_sha256 or "-",
        "bytes": f"{manifest.num_bytes:,}",
        "format": manifest.format,
        "gate": "accepted" if manifest.gate.accepted else f"refused: {'; '.join(manifest.gate.reasons)}",
    }
    table = _table("", "")
    for numbers in (fields, manifest.metrics, {f"gate: {name}": n for name, n in manifest.gate.numbers.items()}):
        for name, value in numbers.items():
            table.add_row(_text(name), _text(value if isinstance(value, str) else number(value)))
    console.print(table)


def show_difference(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `genco.policy_diff.difference` found."""
    console = console or Console()
    first, second = found["first"], found["second"]
    between_s = (second["created_at_ms"] - first["created_at_ms"]) / 1000
    console.print(
        _text(f"model {found['model_id']}: {first['version']} to {second['version']}, made {between_s:+,.1f} s later")
    )
    if first["sha256"] == second["sha256"]:
        console.print(_text("Both have the same weights."))
    sizes = _table("vocabulary", first["version"], second["version"], "added", "removed")
    for name, row in found["vocabulary"].items():
        sizes.add_row(_text(name), *(str(row[column]) for column in ("first", "second", "added", "removed")))
    console.print(sizes)
    for title in ("metrics", "gate", "settings"):
        if found[title]:
            table = _table(title, first["version"], second["version"])
            for name, pair in found[title].items():
                table.add_row(_text(name), *(_text(number(value)) for value in pair))
            console.print(table)
    moved = _table("numbers of both", first["version"], second["version"], "change", "relative", title="norms")
    for row in found["tensors"]:
        values = (number(row[column]) for column in ("first", "second", "change"))
        relative = "-" if row["relative"] is None else f"{row['relative']:.1%}"
        moved.add_row(_text(row["tensor"]), *values, relative)
    console.print(moved)
    for name, rows in found["largest"].items():
        if rows:
            table = _table(f"{name}s that moved most", first["version"], second["version"], "change", title="logits")
            for row in rows:
                table.add_row(_text(row["name"]), *(number(row[column]) for column in ("first", "second", "change")))
            console.print(table)


def change_lines(change: Change, action: str) -> Iterator[str]:
    """Yield what an action has done: before, after, and what comes next."""
    if change.audit is None:
        yield f"nothing to do: {describe(change.after)}"
        return
    yield f"before: {describe(change.before)}"
    yield f"after:  {describe(change.after)}"
    if action == "rollback":
        action = "freeze" if change.after.frozen else "unfreeze"
    if action in ("unpin", "unfreeze") and (change.after.pin or change.after.frozen):
        other = "unpin" if change.after.pin else "unfreeze"
        yield f"Publications are still not served until: genco policy {other}"
    else:
        yield HINTS[action]


def describe(state: RegistryState) -> str:
    """Return the state in words."""
    pointer = state.pointer
    where = "nothing is current" if pointer is None else f"current {pointer.name}, revision {pointer.revision}"
    pin = "" if state.pinned is None else f", pinned to {state.pinned}"
    learning = ", learning frozen" if state.learning_frozen else ""
    explores = "" if state.exploration is None else f", {state.exploration:.0%} explores"
    return where + pin + (", frozen" if state.frozen else "") + learning + explores


def audit_line(record: AuditRecord) -> str:
    """Return an action as one line."""
    reason = f": {printable(record.reason, _REASON_CHARACTERS)}" if record.reason else ""
    return (
        f"{time_text(record.when_ms)}  {record.what.value} by {printable(record.who)}{reason} "
        f"({describe(record.before)} -> {describe(record.after)})"
    )


def number(value: Any) -> str:
    """Return a figure for people."""
    if value is None:
        return "-"
    return f"{value:,.5g}" if isinstance(value, float) else str(value)


def _table(first: str, *columns: str, title: str | None = None) -> Table:
    table = Table(box=None, title=title, title_justify="left", pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _text(content: Any) -> Text:
    return Text(printable(str(content)))
