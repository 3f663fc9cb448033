"""python ray_cluster.py   a Ray cluster of two nodes on this machine, until its standard input ends.

Runs in the environment that has Ray. Reads commands as JSON lines and answers each with a line:

    ["parse", CONFIG]    what Serve understands of a file for `serve deploy`
    ["apply", CONFIG]    has Serve run it
    ["replicas"]         [[id, node, pid, state], ...]
    ["status"]           what Serve says of the application
    ["kill-node"]        kills all processes of the second node
    ["add-node"]         starts a second node again
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema

STORE_BYTES = 80 * 2**20


class TwoNodes:
    """A replica reserves one CPU, so each node has room for one."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, include_dashboard=False)
        self.second = self._add()
        ray.init(address=self.cluster.address, namespace="serve", log_to_driver=False)

    def _add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def parse(self, config: dict[str, Any]) -> dict[str, Any]:
        return ServeDeploySchema.model_validate(config).model_dump(mode="json")

    def apply(self, config: dict[str, Any]) -> None:
        described = ServeDeploySchema.model_validate(config)
        client = serve_start(http_options={"location": described.proxy_location, **described.http_options.model_dump()})
        client.deploy_apps(described)

    def replicas(self) -> list[list[Any]]:
        applications = serve.context._get_global_client().get_serve_details()["applications"]
        return [
            [replica["replica_id"], replica.get("node_id"), replica.get("pid"), replica["state"]]
            for application in applications.values()
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
        ]

    def status(self) -> str:
        return str(serve.status())

    def kill_node(self) -> str:
        node = self.second.node_id
        self.cluster.remove_node(self.second, allow_graceful=False)
        return node

    def add_node(self) -> str:
        self.second = self._add()
        return self.second.node_id


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever Ray prints is no answer
    nodes = TwoNodes()
    print(json.dumps("ready"), file=answers)
    try:
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(getattr(nodes, name.replace("-", "_"))(*arguments)), file=answers)
    finally:
        serve.shutdown()
        ray.shutdown()
        nodes.cluster.shutdown()


if __name__ == "__main__":
    main()
