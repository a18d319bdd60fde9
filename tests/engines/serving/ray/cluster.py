"""A Ray cluster of two nodes on this machine, run as a program in Ray's environment (make ray).

Prints its address as one line, and exits when its standard input closes, so that it never outlives the tests.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

# Two cores each, enough for a second bundle; Ray only counts them and does not reserve real ones.
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
