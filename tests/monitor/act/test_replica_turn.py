"""Two replicas are not restarted at the same time."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from ports import free_port

from monitor.act.replica_turn import taking_turns
from settings import Settings


def of_two(folder: Path) -> tuple[Settings, Settings]:
    whole = Settings(log_dir=folder, api_port=free_port(), replicas=2)
    for number in range(2):
        whole.for_replica(number).log_dir.mkdir(parents=True)
    return whole.for_replica(0), whole.for_replica(1)


def test_the_checker_does_not_wait_for_another_replica_s_restart(tmp_path: Path) -> None:
    first, second = of_two(tmp_path)

    with taking_turns(first, 0.0) as mine, taking_turns(second, 0.0) as busy:
        pass
    with taking_turns(second, 0.0) as later:
        pass

    assert (mine, later) == ("", "")
    assert busy == "another replica is being restarted; this one is next"


def test_a_person_s_restart_waits_for_its_turn(tmp_path: Path) -> None:
    first, second = of_two(tmp_path)
    ended: list[float] = []

    def hold() -> None:
        with taking_turns(first, 0.0):
            time.sleep(1.0)
            ended.append(time.monotonic())

    holder = threading.Thread(target=hold)
    holder.start()
    time.sleep(0.3)
    with taking_turns(second, 30.0) as busy:
        began = time.monotonic()
    holder.join()

    assert busy == "" and began >= ended[0]
