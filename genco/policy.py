"""`genco policy`: shows what the registry holds, and acts on it.

Light to import, for every `genco` command builds its parser.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from streams.contracts.registry import Version
from streams.contracts.settings import KafkaSettings, RedisSettings, SigningSettings, load

if TYPE_CHECKING:
    import redis

    from streams.registry import Registry
    from streams.registry_actions import Change, Operator, Order

REDIS_TIMEOUT_S: Final = 5.0
_VERSION: Final = "EPOCH.VERSION, VERSION alone if that is unique, or current"


def add_parser(verbs: Any) -> None:
    """Add the command to the parser of `genco`."""
    parser = verbs.add_parser(
        "policy",
        help="what is published; pin, freeze, roll back",
        description="Looks at the registry of snapshots in Redis and acts on it. Servers follow within a second. Each "
        "action is kept with who, when, why, before and after, in Redis and in the topic control.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
        added.add_argument("--model-id", metavar="ID", help="default: that of GENCO_MODEL_ID")
        added.add_argument("--json", action="store_true", help="one JSON object instead of text")
        added.set_defaults(command=run)
        return added

    listed = action("list", _list, "the stored versions, newest first, and the last actions")
    listed.add_argument("--limit", type=_count, default=20, metavar="N", help="at most so many of each (%(default)s)")
    shown = action("show", _show, "the manifest of a version")
    shown.add_argument("version", nargs="?", default="current", metavar="VERSION", help=f"{_VERSION} (default)")
    compared = action("diff", _diff, "what differs between two versions; needs GENCO_SIGNING_KEY")
    compared.add_argument("first", metavar="A", help=_VERSION)
    compared.add_argument("second", metavar="B", help=_VERSION)
    for name, text in (
        ("pin", "serve this version and stay with it; learning goes on, its snapshots are stored and not served"),
        ("unpin", "remove the pin; the next publication is served, until then the pointer stays"),
        ("freeze", "stay with the version that serves now; learning goes on, its snapshots are stored and not served"),
        ("unfreeze", "remove the freeze; the next publication is served, until then the pointer stays"),
        ("rollback", "serve an older version, and freeze, so that the next publication does not undo it"),
        ("freeze-learning", "let the learner wait; what it has not learned yet waits in Kafka, and nothing is lost"),
        ("unfreeze-learning", "let the learner go on where it stopped"),
        ("explore", "let only a share of the traffic beside the uniform one explore; 1: all of it, as ever"),
        (
            "accept-clicks",
            "clicks are as rare as the world wants it: end the joiner's holds, learn the click rate anew",
        ),
    ):
        added = action(name, _act, text)
        added.add_argument("--reason", default="", metavar="TEXT", help="why; kept with the action")
        added.add_argument("--who", default=None, metavar="NAME", help="default: user@host")
        if name == "pin":
            added.add_argument("version", metavar="VERSION", help=_VERSION)
        elif name == "explore":
            added.add_argument("share", type=_share, metavar="SHARE", help="from 0 to 1")
        elif name == "rollback":
            added.add_argument(
                "version", nargs="?", metavar="VERSION", help="default: the one stored before the current one"
            )
            added.add_argument(
                "--no-freeze", action="store_true", help="do not freeze: the next publication moves the pointer on"
            )


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 1_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return share


def _list(arguments: argparse.Namespace) -> int:
    from genco.policy_tables import listing, show_listing

    with _registry(arguments.model_id) as (registry, _):
        found = listing(registry, arguments.limit)
    if arguments.json:
        print(json.dumps(found))
    else:
        show_listing(found)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from genco.policy_tables import show_manifest

    with _registry(arguments.model_id) as (registry, _):
        version = resolve(registry, arguments.version)
        manifest, state = registry.manifest(version), registry.state()
    if arguments.json:
        print(manifest.model_dump_json())
    else:
        show_manifest(manifest, state)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from genco.policy_diff import difference
    from genco.policy_tables import show_difference
    from serving.snapshot_store import Pointer, SnapshotStore

    key = load(SigningSettings).signing_key_bytes()
    with _registry(arguments.model_id) as (registry, client):
        store = SnapshotStore(client, registry.model_id, key)
        fetched = []
        for text in (arguments.first, arguments.second):
            version = resolve(registry, text)
            sha256 = registry.manifest(version).sha256
            fetched.append(store.fetch(Pointer(version.epoch, version.number, 0, sha256)))
    found = difference(*((each.manifest, each.blob) for each in fetched))
    if arguments.json:
        print(json.dumps(found))
    else:
        show_difference(found)
    return 0


def _act(arguments: argparse.Namespace) -> int:
    import redis

    from streams.clients import UnreachableError
    from streams.control_log import ControlLog
    from streams.registry_actions import NotRecordedError, Operator, Order
    from streams.telemetry import now_ms

    control = ControlLog(load(KafkaSettings))
    order = Order(who=arguments.who or _user(), when_ms=now_ms(), reason=arguments.reason)
    with _registry(arguments.model_id) as (registry, client):
        version = None if getattr(arguments, "version", None) is None else resolve(registry, arguments.version)
        try:
            change = _done(Operator(registry, client, control.append), arguments, version, order)
        except NotRecordedError as error:
            _tell(arguments, error.change, is_recorded=False)
            raise
        except redis.TimeoutError as error:
            raise UnreachableError(
                f"Redis did not answer in time ({error}), so whether it was done is unknown; see: genco policy list"
            ) from None
    _tell(arguments, change, is_recorded=True)
    return 0


def _done(operator: Operator, arguments: argparse.Namespace, version: Version | None, order: Order) -> Change:
    match arguments.action:
        case "pin" if version is not None:
            return operator.pin(version, order)
        case "unpin":
            return operator.unpin(order)
        case "freeze":
            return operator.freeze(order)
        case "unfreeze":
            return operator.unfreeze(order)
        case "freeze-learning":
            return operator.freeze_learning(order)
        case "unfreeze-learning":
            return operator.unfreeze_learning(order)
        case "explore":
            return operator.explore(arguments.share, order)
        case "accept-clicks":
            return operator.accept_clicks(order)
        case _:
            return operator.rollback(version, order, freeze=not arguments.no_freeze)


def _tell(arguments: argparse.Namespace, change: Change, *, is_recorded: bool) -> None:
    from genco.policy_tables import change_lines

    if arguments.json:
        fields = {
            "changed": change.audit is not None,
            "recorded": is_recorded,
            "before": change.before.model_dump(mode="json"),
            "after": change.after.model_dump(mode="json"),
            "audit": None if change.audit is None else change.audit.model_dump(mode="json"),
        }
        print(json.dumps(fields), flush=True)
        return
    for line in change_lines(change, arguments.action):
        print(line, flush=True)


def resolve(registry: Registry, text: str) -> Version:
    """Return the version that somebody means.

    Raises:
        ValueError: If there is none, or several.
    """
    if text == "current":
        current = registry.state().current
        if current is None:
            raise ValueError(
                f"nothing of model {registry.model_id!r} is current; the first snapshot comes when genco learn has "
                "learned, or name another model with --model-id"
            )
        return current
    if not text.isdecimal():
        return Version.parse(text)
    found = [version for version in registry.history() if version.number == int(text)]
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"{len(found)} stored snapshots of model {registry.model_id!r} have the version {text}"
        + (
            f" ({', '.join(map(str, found))}); write one of them"
            if found
            else "; genco policy list shows what there is"
        )
    )


@contextlib.contextmanager
def _registry(model_id: str | None) -> Iterator[tuple[Registry, redis.Redis]]:
    """Connect to the registry; without retries, so that no action is sent twice."""
    import redis

    from streams.clients import UnreachableError, redis_client
    from streams.registry import Registry

    settings = load(RedisSettings, model_id=model_id)
    client = redis_client(settings, timeout_s=REDIS_TIMEOUT_S, retries=0)
    try:
        yield Registry(client, settings.model_id), client
    except redis.TimeoutError as error:
        raise TimeoutError(f"Redis did not answer in time ({error}); try again") from None
    except redis.ConnectionError as error:
        raise UnreachableError(f"Redis does not answer ({error}); start it, or set GENCO_REDIS_URL") from None
    except redis.RedisError as error:
        raise UnreachableError(f"Redis refuses ({error}); check GENCO_REDIS_URL and what its user may do") from None
    finally:
        client.close()


def _user() -> str:
    """Return who runs this, as user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user id without a name, as in containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"[:128]
