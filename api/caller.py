"""The caller of a request: the name of its key, for the log, the limits and the labels of metrics."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256

SEAL_DIGITS = 16


@dataclass(frozen=True)
class Caller:
    """`probe`: a health probe, which has permits and a thread of its own.

    `claims_probe`: it says that it is one, with a wrong token. It has no privilege, and yet counts as a probe: a checker
    must not take the answers to its own questions for answers to users.

    `secret`: the digest of its key.
    """

    name: str
    probe: bool = False
    claims_probe: bool = False
    secret: bytes = field(default=b"", compare=False, repr=False)

    @property
    def is_user(self) -> bool:
        """Whether its requests count as traffic of users."""
        return not (self.probe or self.claims_probe)

    def seal(self, texts: Iterable[str]) -> str:
        """A short name of these texts: the same on every server with this key. Without the key it says nothing of them."""
        sealed = hmac.new(self.secret, b"cache key", sha256)
        for text in texts:
            data = text.encode(errors="surrogatepass")
            sealed.update(len(data).to_bytes(8))
            sealed.update(data)
        return sealed.hexdigest()[:SEAL_DIGITS]


NOBODY = Caller("-")  # where no key is configured, and on open paths
