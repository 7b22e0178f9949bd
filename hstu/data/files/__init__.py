"""Read tables from files: csv, tsv, parquet, jsonl, json, or sequences; one reader per format.

The format follows from the ending or from :class:`FileFormat`, never from the shape of a line; a file that does not
fit is refused with its first line and the flag to use. Files are read in blocks, as often as asked, in memory that
does not grow with them; every row is read or refused, and counted.
"""

from hstu.data.files.blocks import Table, in_memory, one_event_a_row
from hstu.data.files.formats import FORMATS, FileFormat, printable
from hstu.data.files.open import checksums, open_table, read_table

__all__ = [
    "FORMATS",
    "FileFormat",
    "Table",
    "checksums",
    "in_memory",
    "one_event_a_row",
    "open_table",
    "printable",
    "read_table",
]
