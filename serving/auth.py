"""Who may call what: bearer tokens, known only by their sha256, each with scopes.

`GENCO_API_TOKENS` is a list of `scope:sha256hex`; a token with two scopes stands there twice, and during a rotation
the old and the new one do. Without tokens everything is open, which is refused beyond loopback.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import time
from typing import Final, Literal, get_args

from streams.contracts.secret_files import SecretFile
from streams.contracts.settings import ConfigurationError

logger = logging.getLogger(__name__)

Scope = Literal["public", "decide", "feedback", "admin"]
"""Every route declares one; `public` needs no token."""
SCOPES: Final = frozenset(get_args(Scope)) - {"public"}
_LOOK_AGAIN_S: Final = 1.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


class AuthError(PermissionError):
    """A call without a token (401), or with one that may not do this (403)."""

    def __init__(self, status: Literal[401, 403], message: str) -> None:
        super().__init__(message)
        self.status = status


class Authenticator:
    """Checks the Authorization header of a call.

    Args:
        tokens: Text of the setting `api_tokens`; None: everything is open.
        file: Where that stood, if it may change; it can never become open.
    """

    def __init__(self, tokens: str | None, file: SecretFile | None = None) -> None:
        """Parse the tokens.

        Raises:
            ConfigurationError: If the text is not of the form scope:sha256hex,...
        """
        self._tokens = [] if tokens is None else _parsed(tokens)
        self._file = file
        self._looked_at = time.monotonic()

    def _follow_file(self) -> None:
        """Take new tokens from the file, at most once a second; what cannot be read changes nothing, and is logged."""
        if self._file is None or time.monotonic() - self._looked_at < _LOOK_AGAIN_S:
            return
        self._looked_at = time.monotonic()
        if not self._file.has_changed():
            return
        try:
            self._tokens = _parsed(self._file.read())
        except (OSError, ConfigurationError) as error:
            logger.error("new tokens cannot be read; those before hold", extra={"cause": str(error)})
        else:
            logger.info("tokens read anew", extra={"tokens": len(self._tokens)})

    @property
    def is_open(self) -> bool:
        """Whether no token is needed."""
        return not self._tokens

    def grants(self, scope: Scope) -> bool:
        """Return whether there is a token with this scope."""
        return any(known == scope for known, _ in self._tokens)

    def check(self, authorization: str | None, scope: Scope) -> str | None:
        """Let a call pass, or not; return the beginning of the hash of its token, None where none is needed.

        Args:
            authorization: The header's value.
            scope: What the route needs.

        Raises:
            AuthError: 401 without a known token, 403 if its scopes do not reach.
        """
        self._follow_file()
        if scope == "public" or not self._tokens:
            return None
        kind, _, token = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            raise AuthError(401, "no bearer token; send the header Authorization: Bearer TOKEN")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        # Every token is compared, so that the time tells nothing.
        granted = {known for known, expected in self._tokens if hmac.compare_digest(digest, expected)}
        if not granted:
            raise AuthError(401, "unknown bearer token")
        if scope not in granted:
            raise AuthError(403, f"this token has no scope {scope}")
        return digest.hex()[:8]


def _parsed(tokens: str) -> list[tuple[Scope, bytes]]:
    found: list[tuple[Scope, bytes]] = []
    # The entry is not repeated in the message: someone may have put the bare token there.
    for place, entry in enumerate(tokens.split(","), 1):
        scope, _, digest = entry.strip().partition(":")
        if scope not in SCOPES or not _DIGEST.fullmatch(digest.lower()):
            raise ConfigurationError(
                f"GENCO_API_TOKENS: entry {place} is not scope:sha256hex with scope one of "
                f"{', '.join(sorted(SCOPES))}; make the hash with: printf %s TOKEN | sha256sum"
            )
        found.append((scope, bytes.fromhex(digest)))  # type: ignore[arg-type]
    return found


def require_tokens_beyond_loopback(host: str, authenticator: Authenticator) -> None:
    """Refuse to open a port to others without tokens.

    Raises:
        ConfigurationError: If the host is not loopback and no tokens are set.
    """
    if authenticator.is_open and not is_loopback(host):
        raise ConfigurationError(
            f"GENCO_HTTP_HOST is {host}, which others can reach, and GENCO_API_TOKENS is not set; "
            "set tokens, or bind to 127.0.0.1"
        )


def require_admin_token(authenticator: Authenticator) -> None:
    """Refuse to let whoever reaches the port, a web page in a browser included, act on the registry.

    Raises:
        ConfigurationError: If there is no token with the scope admin.
    """
    if not authenticator.grants("admin"):
        raise ConfigurationError(
            "GENCO_OPERATOR_REDIS_URL is set, by which callers can pin, freeze and roll back, and GENCO_API_TOKENS has "
            "no token with the scope admin; set one, or leave the URL away"
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
