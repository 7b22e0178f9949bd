"""One page about runs: a file of HTML that needs no network, no script and no other file."""

from hstu.inference.report.write import report_at_end, write_report

__all__ = ["report_at_end", "write_report"]
