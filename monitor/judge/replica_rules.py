"""One verdict for the API of several replicas, from theirs: users are served while one of them is. Pure functions.

It opens no restart: each replica is cured by its own run.
"""

from __future__ import annotations

from collections.abc import Sequence

from monitor.judge.evidence import Replica
from monitor.judge.verdict import SERVING, WORDS, Verdict

RULE = "replicas"


def judge_replicas(replicas: Sequence[Replica]) -> Verdict:
    serving = [replica for replica in replicas if replica.word in SERVING]
    not_well = [replica for replica in replicas if replica.word not in ("healthy", "busy")]
    facts = {"replicas": {str(replica.number): replica.word for replica in replicas}}
    count = len(replicas)
    if not not_well:
        busy = all(replica.word == "busy" for replica in replicas)
        return Verdict("api", "busy" if busy else "healthy", RULE, f"All {count} replicas serve.", f"全部 {count} 个副本正常服务。", facts)
    en = " ".join(f"Replica {replica.number} is {replica.word}: {replica.en}" for replica in not_well)
    zh = "".join(f"副本 {replica.number} 为 {replica.word}：{replica.zh}" for replica in not_well)
    if serving:
        return Verdict(
            "api", "degraded", RULE, f"{len(serving)} of {count} replicas serve{'s' if len(serving) == 1 else ''}. {en}",
            f"{count} 个副本中有 {len(serving)} 个在服务。{zh}", facts, "every replica must serve",
        )  # fmt: skip
    # What is on its way comes first, then what is not known: neither is an outage that needs a person.
    words = [replica.word for replica in not_well]
    word = next((word for word in ("starting", "unknown") if word in words), max(words, key=WORDS.index))
    return Verdict("api", word, RULE, f"No replica serves. {en}", f"没有副本在服务。{zh}", facts, "one replica must serve")


def out_of_service(replicas: Sequence[Replica]) -> set[int]:
    """The numbers of those that nginx shall send no requests to: none, if that would leave nobody to ask."""
    out = {replica.number for replica in replicas if replica.word not in (*SERVING, "unknown")}
    return out if len(out) < len(replicas) else set()
