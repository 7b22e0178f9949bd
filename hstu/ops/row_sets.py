"""What the map from ids to rows (``hstu.parallel.row_map``) and its compiled loops have to agree on."""

PARTS = 16  # of a map, each known to one rank; the last of its rows is for ids without one
WAYS = 8  # of a set, so that eight comparisons are the bytes of one number
FREE = 2**63 - 1
"""Where no id has the place. Neither this nor ``BLOCKED`` can be an id with a row of its own."""
BLOCKED = FREE - 1
"""Where there is no row, for sets are of one size."""
NEVER = 2**31 - 1  # the score of a blocked place
AGEING = 4  # counters of the sketch that are halved for one id that is counted
GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as int64: Fibonacci hashing
