"""Make a data set: hstu-preprocess --dataset_name NAME [--data_dir ./tmp_data].

NAME is synthetic, ml-100k, ml-1m, ml-20m, kuairand-pure, kuairand-1k, kuairand-27k, amazon-books, amazon-beauty,
amazon-sports, amazon-toys, custom, or all (every one but custom). The data set is written to <data_dir>/<name>/.
Raw files are looked for in <raw_dir>/<name>/, <raw_dir>/, <data_dir>/<name>/ and <data_dir>/, plain, where unpacking
puts them or in the published archive, and downloaded when they are nowhere. A user's mistake is one line on stderr
and exit code 2. A run that is stopped leaves the old data set or the new one.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, get_args

from absl import app, flags

from hstu.cli.flags import import_modules, refuse_repeats, show_in_help, underscore_flags
from hstu.data.atomic_directory import require_writable
from hstu.data.cleaning import Missing
from hstu.data.declarations import GRAMMAR
from hstu.data.files import FORMATS, FileFormat, printable
from hstu.data.interactions import ConsecutiveRepeats, Duplicates, InteractionSpec
from hstu.data.overview import size_of
from hstu.data.repeats import MANY_REPEATS, REPEATS_MATTER
from hstu.data.schema import ActionType, Kind, Level, Schema
from hstu.data.synthetic import Distribution, SyntheticConfig, generate
from hstu.data.table import encode
from hstu.data.writer import write_dataset, writing
from hstu.interrupt import StopRequest, requested
from hstu.preprocessing import amazon, kuairand, movielens
from hstu.preprocessing.progress import Progress
from hstu.preprocessing.published import make_published

DATASETS = movielens.DATASETS | kuairand.DATASETS | amazon.DATASETS
TABLES = {"interactions": "", "users": "users_", "items": "items_"}  # files, and what their format's flags begin with
FILTERS = ("min_user_events", "min_item_events", "max_user_events")
NAMED = ("synthetic", *DATASETS)
FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of the command; hyphens and underscores both work."""
    flags.DEFINE_string("dataset_name", None, f"One of {', '.join(NAMED)}, custom, or all (but custom).")
    flags.DEFINE_string("data_dir", "tmp_data", "Where data sets are written.")
    flags.DEFINE_string("raw_dir", None, "Where raw files are, besides data_dir; downloads go there too.")
    flags.DEFINE_bool("check_counts", True, "Check users, items and events against the published numbers.")
    spec: dict[str, Any] = {field.name: field.default for field in fields(InteractionSpec)}
    flags.DEFINE_multi_string("import", [], "Module that registers a reader of your own; repeatable.")
    flags.DEFINE_string("name", None, "custom: name of the data set.")
    flags.DEFINE_string("interactions", None, "custom: events, a file or a directory or pattern of parts.")
    flags.DEFINE_string("users", None, "custom: file of users; --user_features says what it holds.")
    flags.DEFINE_string("items", None, "custom: file of items; --item_features says what it holds.")
    flags.DEFINE_string("user_column", spec["user_column"], "custom: column of user ids, in both files.")
    flags.DEFINE_string("item_column", spec["item_column"], "custom: column of item ids, in both files.")
    flags.DEFINE_string("time_column", None, "custom: column of times; without it, the order of the rows.")
    flags.DEFINE_string("time_format", None, "custom: pattern of times, as '%d.%m.%Y %H:%M'; default ISO or numbers.")
    flags.DEFINE_string("action_column", None, "custom: column of actions; click,like,buy makes a bit mask of three.")
    flags.DEFINE_enum("action_type", spec["action_type"], get_args(ActionType), "custom: how to read actions.")
    for level in get_args(Level):
        owner = "custom, synthetic" if level == "event" else "custom"
        flags.DEFINE_string(f"{level}_features", None, f"{owner}: what columns of {level}s are: {GRAMMAR}; kinds: "
                            f"{', '.join(get_args(Kind))}, and control for what is only kept.")  # fmt: skip
    flags.DEFINE_string("set_separator", spec["set_separator"], "custom: between the members of a set, and the numbers "
                        "of a vector, within one column; --separator is between columns.")  # fmt: skip
    flags.DEFINE_string("session_column", None, "custom: column of sessions, each a sequence, in place of users.")
    flags.DEFINE_string("session_gap", None, "custom: 30m, 12h, 1d: cut users at gaps longer than it; ann#2 is one.")
    flags.DEFINE_enum(
        "consecutive_repeats", spec["consecutive_repeats"], get_args(ConsecutiveRepeats),
        "custom: events of the item that the event before them is of.",
    )  # fmt: skip
    flags.DEFINE_enum("duplicates", spec["duplicates"], get_args(Duplicates), "custom: rows that are equal.")
    flags.DEFINE_enum("missing", spec["missing"], get_args(Missing), "custom: rows that lack an id, time or action.")
    for name, prefix in TABLES.items():
        known = ", ".join(FORMATS)
        flags.DEFINE_string(f"{prefix}format", None, f"custom: of --{name}: {known}; default by its ending.")
        flags.DEFINE_string(f"{prefix}separator", None, f"custom: between the columns of --{name}, as ';', '::' or "
                            "tab; within a column of sets: --set_separator.")  # fmt: skip
        flags.DEFINE_enum(
            f"{prefix}quoting", None, ("double", "none"), f"custom: of --{name}; default double for csv, none for tsv."
        )
        flags.DEFINE_string(f"{prefix}columns", None, f"custom: a,b,c: columns of --{name} if it has no header.")
        flags.DEFINE_string(f"{prefix}encoding", None, f"custom: of --{name}; default utf-8, or utf-16 if it looks so.")
    default = "; default 0 (all), for amazon the published 5."
    flags.DEFINE_integer("min_user_events", None, "Drop users with fewer events" + default)
    flags.DEFINE_integer("min_item_events", None, "Drop items with fewer events, repeated with the users" + default)
    flags.DEFINE_integer("max_user_events", None, "Keep the most recent events of each user; default 0 (all).")
    for field in (field for field in fields(SyntheticConfig) if field.name not in FLAGS):
        text, known = f"synthetic: {field.name.replace('_', ' ')}, see hstu.data.synthetic.", cast(Any, field.default)
        if isinstance(known, str):
            flags.DEFINE_enum(field.name, known, get_args(Distribution), text)
        elif isinstance(known, bool):
            flags.DEFINE_boolean(field.name, known, text)
        elif isinstance(known, int):
            flags.DEFINE_integer(field.name, known, text)
        else:
            flags.DEFINE_float(field.name, known, text)
    refuse_repeats(FLAGS, "dataset_name")


def main() -> None:
    """Run the command."""
    define_flags()
    show_in_help(FLAGS, __name__, __doc__)
    app.run(_guarded, argv=underscore_flags(sys.argv), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error}".splitlines()[0] + " (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def _guarded(argv: list[str]) -> int:
    # A library that asks nobody for long is ended in the midst of it; the next run clears away what is left.
    with StopRequest(lambda: f"interrupted: {FLAGS.data_dir} is as it was"):
        return _answer(argv)


def _answer(argv: list[str]) -> int:
    logger = logging.getLogger("hstu")
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        if len(argv) > 1:
            raise ValueError(f"argument {argv[1]!r} is no flag; flags start with --")
        _refuse_foreign_flags()
        import_modules(FLAGS.get_flag_value("import", []))
        if FLAGS.dataset_name == "all":  # one whose files are not to be had keeps nobody from the others
            return max([_reported(name) for name in NAMED])
        _make(FLAGS.dataset_name)
    except ValueError as error:
        return _report(error)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted {interrupt}".rstrip(), file=sys.stderr)
        return 128 + (requested() or signal.SIGINT)
    return 0


def _reported(name: str) -> int:
    try:
        _make(name)
    except ValueError as error:
        return _report(error)
    return 0


def _report(error: ValueError) -> int:
    print("error: " + printable(" ".join(str(error).split())), file=sys.stderr)
    return 2


def _refuse_foreign_flags() -> None:
    """A flag of another data set would be ignored: say so."""
    for flag in (FLAGS[name] for name in FLAGS):
        owner = re.sub(r"^<[^>]*>: ", "", flag.help).partition(":")[0]  # a flag of choices names them first
        if flag.present and owner in ("custom", "synthetic") and FLAGS.dataset_name not in (owner, "all"):
            raise ValueError(f"--{flag.name} belongs to --dataset_name {owner}, not {FLAGS.dataset_name}")
        if flag.present and flag.name in FILTERS and FLAGS.dataset_name == "synthetic":
            raise ValueError(f"--{flag.name} does not apply to --dataset_name synthetic; its lengths have flags")


def _make(name: str | None) -> None:
    require_writable(FLAGS.data_dir)
    if name == "synthetic":
        schema, directory = _make_synthetic()
    elif name == "custom":
        schema, directory = _make_custom()
    elif name in DATASETS:
        schema, directory = _make_published(name)
    else:
        given = "is missing" if name is None else f"is {name!r}"
        raise ValueError(f"--dataset_name {given}; choose one of {', '.join((*NAMED, 'custom', 'all'))}")
    print(summary(schema, directory))


def _make_synthetic() -> tuple[Schema, Path]:
    directory = Path(FLAGS.data_dir) / "synthetic"
    with _progress("synthetic", directory) as progress:
        dataset = generate(SyntheticConfig(**_flags_of(SyntheticConfig)), directory.name, progress)
        write_dataset(dataset, directory)
    return dataset.schema, directory


def _make_published(name: str) -> tuple[Schema, Path]:
    data_dir, raw_dir = Path(FLAGS.data_dir), Path(FLAGS.raw_dir or FLAGS.data_dir)
    directory = data_dir / name
    with _progress(name, directory) as progress:
        schema = make_published(
            name,
            DATASETS[name],
            directories=[raw_dir / name, raw_dir, data_dir / name, data_dir],
            download_to=raw_dir / name,
            directory=directory,
            progress=progress,
            filters={flag: value for flag in FILTERS if (value := FLAGS[flag].value) is not None},
            check_counts=FLAGS.check_counts,
        )
    return schema, directory


def _make_custom() -> tuple[Schema, Path]:
    for flag in ("name", "interactions"):
        if not FLAGS[flag].value:
            raise ValueError(f"--dataset_name custom needs --{flag}")
    if FLAGS.name in NAMED:
        raise ValueError(f"--name {FLAGS.name} is that of a published data set; choose another")
    names = {"file": FLAGS.interactions, "users_file": FLAGS.users or "users", "items_file": FLAGS.items or "items"}
    spec = InteractionSpec(**_flags_of(InteractionSpec), **names)
    directory = Path(FLAGS.data_dir) / spec.name
    with _progress(spec.name, directory) as progress, writing(directory) as writer:
        progress.work = writer.work
        formats = {name: _format(prefix) for name, prefix in TABLES.items()}
        schema = encode(
            FLAGS.interactions, spec, writer, users=FLAGS.users, items=FLAGS.items, formats=formats, progress=progress
        )
        writer.schema(schema)
        progress.finish(int(schema.counts["events"]))
    return schema, directory


@contextmanager
def _progress(name: str, directory: Path) -> Iterator[Progress]:
    """Show how far a run is, and say where one that is interrupted was."""
    progress = Progress(name)
    try:
        yield progress
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"while {progress.state}: {directory} is as it was") from interrupt
    finally:
        progress.close()


def _format(prefix: str) -> FileFormat:
    names = [field.name for field in fields(FileFormat) if field.name != "prefix"]
    return FileFormat(**{name: FLAGS[prefix + name].value for name in names}, prefix=prefix)


def _flags_of(owner: type) -> dict[str, Any]:
    """The flags that are fields of the dataclass ``owner`` and have a value."""
    known = (field.name for field in fields(owner) if field.name in FLAGS)
    return {name: FLAGS[name].value for name in known if FLAGS[name].value is not None}


def summary(schema: Schema, directory: Path) -> str:
    """A small table of what a data set holds."""
    counts = schema.counts
    rows = [
        ("users", f"{counts['users']:,}"),
        ("items", f"{counts['items']:,}"),
        ("events", f"{counts['events']:,}"),
        (
            "events per user",
            f"{counts['seqlen_min']} .. {counts['seqlen_max']}, "
            f"mean {counts['seqlen_mean']:.1f}, median {counts['seqlen_median']:g}",
        ),
    ]
    repeats = int(counts["repeats"])
    share = repeats / counts["events"]
    rows.append(("repeats", f"{repeats:,} events ({share:.1%}) of an item that their user met before"))
    if schema.action:
        rows.append((schema.action.name, f"{schema.action.action_type}, {schema.action.vocab_size} values"))
    for level in get_args(Level):
        rows += [
            (feature.name, f"{feature.kind if feature.role == 'feature' else 'kept'}, of {level}s, {size_of(feature)}")
            for feature in schema.stored(level)
        ]
    for split, scores in (schema.best_possible or {}).items():
        rows.append((f"best {split}", ", ".join(f"{name} {score:.3f}" for name, score in scores.items())))
    lines = [f"{schema.name}: {directory}"] + [f"  {name:<16} {value}" for name, value in rows]
    if share > MANY_REPEATS:
        lines.append(f"  warning: users come back to items; {REPEATS_MATTER}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
