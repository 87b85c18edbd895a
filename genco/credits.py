"""`genco credits`: its options, where it finds snapshot and candidates, and what it does with them.

Light to import, for every `genco` command builds its parser.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from streams.contracts.settings import KafkaSettings, RedisSettings, SigningSettings, load

if TYPE_CHECKING:
    from serving.explain import Question
    from serving.explanation import CandidatesFrom
    from serving.policy import Policy
    from serving.snapshot_store import Fetched
    from streams.contracts.catalog import Catalog

REDIS_TIMEOUT_S: Final = 5.0
_POLL_MS: Final = 500
_MAX_FILE_BYTES: Final = 16 * 1024 * 1024


def add_parser(verbs: Any) -> None:
    """Add the command to the parser of `genco`."""
    parser = verbs.add_parser(
        "credits",
        help="which element of a product's card earns what, for whom, and how sure that is",
        description="Explains a product's card under the snapshot that serves now: the uplift of each candidate over "
        "an average one of its slot, with 90 % intervals, by context and by pairs.",
    )
    parser.add_argument("product", metavar="PRODUCT", help="product id")
    parser.add_argument(
        "--context",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="for whom, such as device=ios; default: all",
    )
    parser.add_argument("--slot", metavar="NAME", help="only this slot")
    parser.add_argument("--model-id", metavar="ID", help="default: that of GENCO_MODEL_ID")
    parser.add_argument("--snapshot", type=Path, metavar="FILE", help="a file of GENCO_LAST_GOOD_DIR instead of Redis")
    parser.add_argument(
        "--candidates", type=Path, metavar="FILE", help='JSON such as {"title": ["t1", "t2"]} instead of the catalog'
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the slots")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Explain a card.

    Raises:
        ValueError: If there is no such product, slot or field, or a file is not what it should be.
        OSError: If Redis, Kafka or a file cannot be read.
    """
    import msgspec

    from genco.folders import require_folder
    from serving.credits_answer import snapshot_name
    from serving.explain import explain
    from serving.explanation import CardCredits
    from serving.policy import Policy

    require_folder(arguments.plot)
    draw = _drawer() if arguments.plot else None
    fetched = _fetch(arguments.snapshot, arguments.model_id)
    policy = Policy.from_snapshot(fetched.blob, fetched.manifest)
    question, source = _question(arguments, policy)
    found = CardCredits(
        snapshot=snapshot_name(fetched.manifest), candidates_from=source, explanation=explain(policy, question)
    )
    if arguments.json:
        print(msgspec.json.encode(found).decode())
    else:
        from genco.credits_tables import show

        show(found)
    if draw is not None:
        draw(found, arguments.plot)
    return 0


def _drawer() -> Callable[[Any, Path], None]:
    """Return what draws; before the work, so that a missing library is named at once."""
    from genco.credits_plot import draw

    return draw


def _fetch(path: Path | None, model_id: str | None) -> Fetched:
    """Return the verified snapshot from a file or from Redis."""
    from redis import RedisError

    from serving.snapshot_store import SnapshotStore, read_last_good
    from streams.clients import UnreachableError, redis_client

    key = load(SigningSettings).signing_key_bytes()
    if path is not None:
        return read_last_good(path, model_id, key)
    settings = load(RedisSettings, model_id=model_id)
    client = redis_client(settings, timeout_s=REDIS_TIMEOUT_S, retries=1)
    try:
        fetched = SnapshotStore(client, settings.model_id, key).fetch_current(None)
    except RedisError as error:
        raise UnreachableError(f"Redis does not answer ({error}); start it, or set GENCO_REDIS_URL") from None
    finally:
        client.close()
    if fetched is None:
        raise ValueError(
            f"Redis has no snapshot of model {settings.model_id!r}; the first one comes when genco learn has learned, "
            "or name another with --model-id"
        )
    return fetched


def _question(arguments: argparse.Namespace, policy: Policy) -> tuple[Question, CandidatesFrom]:
    """Return the question, and where the card's candidates come from."""
    from serving.credits_answer import card_of, content_of
    from serving.explain import Question, read_context
    from streams.contracts.catalog import Catalog

    source: CandidatesFrom = "given"
    catalog = Catalog()
    candidates: Mapping[str, Sequence[str]]
    if arguments.candidates is not None:
        candidates = read_candidates(arguments.candidates)
    else:
        if os.environ.get("GENCO_KAFKA_BOOTSTRAP_SERVERS"):
            catalog = read_catalog(load(KafkaSettings))
        candidates, source = card_of(arguments.product, policy.spec, catalog)
    question = Question(
        product_id=arguments.product,
        candidates=candidates,
        content=content_of(candidates, catalog),
        context=read_context(policy.spec, _fields(arguments.context)),
        slot=arguments.slot,
    )
    return question, source


def read_candidates(path: Path) -> dict[str, list[str]]:
    """Read a JSON object of slot -> element ids.

    Raises:
        ValueError: If the file holds something else.
        OSError: If it cannot be read.
    """
    import msgspec

    with path.open("rb") as file:
        data = file.read(_MAX_FILE_BYTES)
    try:
        candidates = msgspec.json.decode(data, type=dict[str, list[str]])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} holds no candidates ({error}); expected such as {{"title": ["t1", "t2"]}}') from None
    for slot, ids in candidates.items():
        if len(set(ids)) != len(ids):
            raise ValueError(f"{path}: slot {slot!r} names an element twice")
    return candidates


def read_catalog(settings: KafkaSettings) -> Catalog:
    """Read the topic `catalog` to its end; records that are not of its form are told of and left out.

    Raises:
        UnreachableError: If no broker answers.
        ConfigurationError: If there is no such topic.
    """
    from kafka.errors import KafkaError

    from streams.clients import UnreachableError, assign_whole_topic, kafka_consumer
    from streams.contracts.catalog import Catalog
    from streams.contracts.topics import CATALOG

    catalog, num_bad = Catalog(), 0
    consumer = kafka_consumer(settings)
    try:
        assignment = assign_whole_topic(consumer, CATALOG)
        ends = consumer.end_offsets(assignment)
        while any(consumer.position(part) < ends[part] for part in assignment):
            for batch in consumer.poll(timeout_ms=_POLL_MS).values():
                for record in batch:
                    try:
                        catalog.apply(record.key, record.value)
                    except ValueError:
                        num_bad += 1
    except KafkaError as error:
        raise UnreachableError(f"Kafka stopped answering ({type(error).__name__}: {error}); try again") from None
    finally:
        consumer.close()
    if num_bad:
        print(f"{num_bad} records of the topic {CATALOG} could not be read and were left out", file=sys.stderr)
    return catalog


def _fields(texts: Sequence[str]) -> Mapping[str, str]:
    """Read fields of the context.

    Example:
        >>> _fields(["device=ios", "segment=u=3"])
        {'device': 'ios', 'segment': 'u=3'}
    """
    out: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals) or name in out:
            raise ValueError(f"--context {text!r} is no field, or a second time; expected such as device=ios")
        out[name] = value
    return out
