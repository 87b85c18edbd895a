"""What is done by itself when an alert fires: carries out the table `GENCO_ALERT_ACTIONS`.

`Responder.respond(alert)` takes a record of the topic `alerts` and returns it with what was done and the command that
undoes each. Actions are those of operators, by the same scripts, so each has its audit, in Redis and in the topic
`control`: who is the process, the reason names the alert's id. The audit is also the memory: an action that stands
there for an alert is not done for it again, whoever asks. So a repeated record or a restart changes nothing, and joiner
and monitor may answer the same alert. Learning that an alert has frozen goes on when that alert is resolved, unless
somebody has acted on learning since; everything else stays until somebody undoes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Final

import redis

from streams.contracts.alerts import Alert
from streams.contracts.control import Action, AuditRecord
from streams.contracts.registry import Version
from streams.registry import Registry
from streams.registry_actions import ActionRefusedError, Change, NotRecordedError, Operator, Order

logger = logging.getLogger(__name__)

AUDIT_LOOKED_AT: Final = 200
"""Newest actions among which those for an alert are found."""


class AutomaticAction(StrEnum):
    """What an alert can set off."""

    FREEZE_LEARNING = "freeze-learning"
    FREEZE_PUBLICATION = "freeze-publication"
    ROLLBACK = "rollback"
    """To the newest stored version made before the alert began to fire, and freeze."""
    SHRINK_EXPLORATION = "shrink-exploration"


UNDO: Final = {
    AutomaticAction.FREEZE_LEARNING: "genco policy unfreeze-learning",
    AutomaticAction.FREEZE_PUBLICATION: "genco policy unfreeze",
    AutomaticAction.ROLLBACK: "genco policy unfreeze",
    AutomaticAction.SHRINK_EXPLORATION: "genco policy explore 1",
}
_AUDITED: Final = {
    AutomaticAction.FREEZE_LEARNING: Action.FREEZE_LEARNING,
    AutomaticAction.FREEZE_PUBLICATION: Action.FREEZE,
    AutomaticAction.ROLLBACK: Action.ROLLBACK,
    AutomaticAction.SHRINK_EXPLORATION: Action.EXPLORE,
}


def parse_table(text: str) -> dict[str, tuple[AutomaticAction, ...]]:
    """Read a table of actions.

    Args:
        text: `Name=action+action,Name=action`; a name stands once.

    Raises:
        ValueError: If it is none.

    Example:
        >>> parse_table("JoinRateDrop=freeze-learning")
        {'JoinRateDrop': (<AutomaticAction.FREEZE_LEARNING: 'freeze-learning'>,)}
    """
    table: dict[str, tuple[AutomaticAction, ...]] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, actions = entry.partition("=")
        try:
            found = tuple(AutomaticAction(action.strip()) for action in actions.split("+"))
        except ValueError:
            known = ", ".join(AutomaticAction)
            raise ValueError(f"{entry!r} is no ALERT=ACTION[+ACTION...]; actions are {known}") from None
        if not name.strip() or name.strip() in table:
            raise ValueError(f"{entry!r} has no name of an alert, or one that stands twice")
        table[name.strip()] = found
    return table


class Responder:
    """Answers alerts of one model.

    Every call may raise `redis.RedisError`; call it again then.

    Args:
        registry: Of the model.
        operator: Of the same.
        table: Name of an alert -> what to do, in this order.
        exploration: Share that explores after `shrink-exploration`.
        who: This process, for the audit.
        now_ms: The wall clock.
    """

    def __init__(
        self,
        registry: Registry,
        operator: Operator,
        table: Mapping[str, Sequence[AutomaticAction]],
        *,
        exploration: float,
        who: str,
        now_ms: Callable[[], int],
    ) -> None:
        self._registry = registry
        self._operator = operator
        self._table = table
        self._exploration = exploration
        self._who = who
        self._now_ms = now_ms

    def respond(self, alert: Alert) -> Alert:
        """Do what the table says of an alert; return it with what was done added to its actions."""
        actions = self._table.get(alert.name, ())
        if alert.model_id != self._registry.model_id or not actions:
            return alert
        audit = self._registry.audit(AUDIT_LOOKED_AT)
        if alert.state == "resolved":
            told = self._go_on(alert, audit)
            return alert.model_copy(update={"actions": [*alert.actions, *told]})
        told = [done for action in actions if (done := self._do(action, alert, audit)) is not None]
        return alert.model_copy(update={"actions": [*alert.actions, *told]})

    def _do(self, action: AutomaticAction, alert: Alert, audit: Sequence[AuditRecord]) -> str | None:
        if any(record.what == _AUDITED[action] and alert.alert_id in record.reason for record in audit):
            return f"{action}; undo: {UNDO[action]}"
        order = self._order(alert, "fired")
        try:
            change = self._act(action, alert, order)
        except NotRecordedError as error:
            logger.warning("an action is not in the topic control yet", extra={"action": action, "cause": str(error)})
            change = error.change
        except ActionRefusedError as error:
            logger.error("an alert's action was refused", extra={"action": action, "cause": str(error)})
            return f"{action}: refused ({error.refusal})"
        if change.audit is None:
            return None  # it is so already, by somebody else's hand, who will undo it
        logger.warning("done because of an alert", extra={"action": action, "alert": alert.alert_id})
        return f"{action}; undo: {UNDO[action]}"

    def _act(self, action: AutomaticAction, alert: Alert, order: Order) -> Change:
        match action:
            case AutomaticAction.FREEZE_LEARNING:
                return self._operator.freeze_learning(order)
            case AutomaticAction.FREEZE_PUBLICATION:
                return self._operator.freeze(order)
            case AutomaticAction.ROLLBACK:
                return self._operator.rollback(self._last_good(alert.since_ms), order)
            case AutomaticAction.SHRINK_EXPLORATION:
                return self._operator.explore(self._exploration, order)

    def _go_on(self, alert: Alert, audit: Sequence[AuditRecord]) -> list[str]:
        """Let learning go on if this alert was the last to freeze it."""
        about = (Action.FREEZE_LEARNING, Action.UNFREEZE_LEARNING)
        newest = next((record for record in audit if record.what in about), None)
        if newest is None or newest.what is Action.UNFREEZE_LEARNING or alert.alert_id not in newest.reason:
            return []
        try:
            self._operator.unfreeze_learning(self._order(alert, "resolved"))
        except NotRecordedError as error:
            logger.warning("an action is not in the topic control yet", extra={"cause": str(error)})
        logger.warning("learning goes on: its alert is resolved", extra={"alert": alert.alert_id})
        return ["unfreeze-learning"]

    def _last_good(self, before_ms: int) -> Version | None:
        """Return the newest version made before a time; None: the one before the current, as far as one knows."""
        history = self._registry.history()
        current = self._registry.state().current
        for version, manifest in self._registry.manifests(history).items():
            if manifest is not None and manifest.created_at_ms < before_ms and (current is None or version <= current):
                return version
        return None

    def _order(self, alert: Alert, what: str) -> Order:
        reason = f"{alert.name} {what} ({alert.alert_id}): {alert.summary}"
        return Order(who=self._who, when_ms=self._now_ms(), reason=reason[:1_000])


def try_to_respond(responder: Responder, alert: Alert) -> Alert:
    """Return what `respond` does; while Redis does not answer, the alert itself, which says so."""
    try:
        return responder.respond(alert)
    except redis.RedisError as error:
        logger.error("Redis does not answer; an alert's actions are not done", extra={"cause": str(error)})
        note = f"not done, Redis does not answer ({type(error).__name__})"
        return alert.model_copy(update={"actions": [*alert.actions, note]})
