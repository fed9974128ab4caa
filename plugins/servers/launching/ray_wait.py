"""Wait until a Ray cluster is complete: `RAY_ADDRESS=HOST:PORT ray_wait.py GPUS NODES`.

A program of its own: it runs in the server's environment, which has Ray and may not have `sdg`.
"""

import sys
import time


def main(gpus: int, nodes: int) -> None:
    """Print every second how many GPUs and nodes have joined, until there are enough."""
    import ray

    ray.init(log_to_driver=False, logging_level="ERROR")
    while True:
        joined = ray.cluster_resources().get("GPU", 0.0)
        alive = sum(node["Alive"] for node in ray.nodes())
        print(f"the Ray cluster has {joined:.0f} of {gpus} GPUs, on {alive} of {nodes} nodes", flush=True)
        if joined >= gpus and alive >= nodes:
            return
        time.sleep(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
