"""The one place that knows about ranks: process groups, sharded tables, data-parallel dense weights."""

from hstu.quiet import silence_known_notices

silence_known_notices()

from hstu.parallel.mesh import Mesh  # noqa: E402
from hstu.parallel.parallelize import Parallelized, parallelize  # noqa: E402

__all__ = ["Mesh", "Parallelized", "parallelize"]
