"""The caller of a request: the name of its key, for the log, the limits and the labels of metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """`probe`: a health probe, which has permits and a thread of its own.

    `claims_probe`: it says that it is one, with a wrong token. It has no privilege, and yet counts as a probe: a checker
    must not take the answers to its own questions for answers to users.
    """

    name: str
    probe: bool = False
    claims_probe: bool = False

    @property
    def is_user(self) -> bool:
        """Whether its requests count as traffic of users."""
        return not (self.probe or self.claims_probe)


NOBODY = Caller("-")  # where no key is configured, and on open paths
