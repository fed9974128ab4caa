"""Waits until a Ray cluster is complete: `RAY_ADDRESS=HOST:PORT ray_wait.py GPUS NODES`.

A program of its own: it runs in the environment of the server, which has Ray and may not have `sdg`.
"""

import sys
import time


def main(gpus: int, nodes: int) -> None:
    """Say every second what has joined, until that is enough."""
    import ray

    ray.init(log_to_driver=False, logging_level="ERROR")
    while True:
        here = ray.cluster_resources().get("GPU", 0.0)
        members = sum(node["Alive"] for node in ray.nodes())
        print(f"the Ray cluster has {here:.0f} of {gpus} GPUs, on {members} of {nodes} nodes", flush=True)
        if here >= gpus and members >= nodes:
            return
        time.sleep(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
