"""How the processes of a job find each other, also after a restart."""

from __future__ import annotations

import time
import uuid

import torch.distributed as dist


def join() -> tuple[dist.Store, int, int]:
    """Return a store, this rank and the number of ranks, as torchrun's environment describes them.

    torchrun keeps one store through all restarts of a job, whose old keys would send ranks to dead peers: rank 0
    names each attempt, and every rank makes sure that it has heard the rank 0 of its own.
    """
    store, rank, world_size = next(dist.rendezvous("env://"))
    name, others = uuid.uuid4().hex, range(1, world_size)
    if rank == 0:
        heard = False
        while not heard:
            names = [store.get(f"rank/{other}").decode() for other in others]
            store.set("attempt", ",".join([name, *names]))
            heard = not names or store.check([f"{name}/{other}" for other in others])
            time.sleep(0 if heard else 0.02)
        return dist.PrefixStore(name, store), rank, world_size
    store.set(f"rank/{rank}", name)
    while True:
        attempt, *names = store.get("attempt").decode().split(",")
        if name in names:
            store.set(f"{attempt}/{rank}", "")
            return dist.PrefixStore(attempt, store), rank, world_size
        time.sleep(0.02)
