"""A Ray cluster of two nodes on this machine, in the environment that has Ray (make ray): run as a program.

It prints its address as one line, and goes when its standard input ends: with the tests that started it, however
they end.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

# Two cores each, so that there is room for a second bundle; Ray counts them and reserves none of the machine's.
NODE = {"num_cpus": 2, "object_store_memory": 150 << 20, "include_dashboard": False, "node_ip_address": "127.0.0.2"}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        cluster.add_node(**NODE)
        print(cluster.address, flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
