"""The server of serve.py on several machines or GPUs: replicas of it behind one address, by Ray Serve.

    python examples/serve_ray.py --replicas 2 --random-weights --conversations /tmp/conversations
    python examples/serve_ray.py --replicas 8 --gpus 1 --model Qwen/Qwen2.5-3B-Instruct --conversations /shared/folder

You will see the address. Each replica holds the whole model and rows of its own. Any replica can answer any turn of a
conversation: they are kept in a folder that all replicas share, and not in memory.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import Help, find_adapter, number, positive, user_errors
from serve import build
from serve import parser as options_of_a_server
from serving.app import create_app


def parser() -> argparse.ArgumentParser:
    """The command line: the options of a server, and how many there are."""
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=Help,
        parents=[options_of_a_server()],
        conflict_handler="resolve",
    )
    made.add_argument("--replicas", type=positive, default=2, help="servers (default: 2)")
    made.add_argument("--gpus", type=number(64), default=0, help="GPUs of each (default: 0)")
    made.add_argument("--cpus", type=number(1024), default=1, help="CPU cores of each (default: 1)")
    return made


def deployment(args: argparse.Namespace) -> Any:
    """Replicas of a server, to be run by ``ray.serve.run``.

    Args:
        args: the command line; ``conversations`` names a folder that all replicas can write to, if there is one.
    """
    from ray import serve

    args.in_memory = 0

    @serve.deployment(
        name="ahn_layers",
        num_replicas=args.replicas,
        max_ongoing_requests=args.rows + args.waiting,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        graceful_shutdown_timeout_s=args.grace + 10,
    )
    @serve.ingress(lambda: create_app(build(args)))  # in the process of the replica
    class Replica:
        """A server."""

    return Replica.bind()


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until the process is told to end."""
    args = parser().parse_args(argv)
    with user_errors("serve_ray"):
        find_adapter(args.adapter)  # before any replica is started
    if args.conversations is not None:
        args.conversations = args.conversations.resolve()
    import ray
    from ray import serve

    folder = str(Path(__file__).parent)
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": ":".join([folder, *filter(None, sys.path)])}})
    serve.start(http_options={"host": args.host, "port": args.port})
    try:
        serve.run(deployment(args), route_prefix="/", blocking=True)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()
