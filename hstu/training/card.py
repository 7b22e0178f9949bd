"""The model card of a run: what it was trained on, what it scores, and how it is used, in Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hstu.config import Config
from hstu.data.schema import Schema
from hstu.metrics.ranking import lower_is_better
from hstu.training.checkpoint_files import write_atomically

_USES = {
    "retrieval": "To rank the items of this catalogue for users of this kind, those of the data set or new ones, by "
    "what they are likely to do next.",
    "ranking": "To predict what users of this kind do with items of this catalogue that they are shown.",
}
_LOADS = {
    "retrieval": 'run.recommend(k=10)                    # user, rank, item, score\nrun.recommend(histories=frame, '
    "k=10)   # users that the model never saw",
    "ranking": "run.score(pairs)                       # a table of users and items",
}  # fmt: skip


def write_card(run: Path, config: Config, schema: Schema, record: dict[str, Any]) -> None:
    """Write ``card.md`` in the run directory ``run``.

    Args:
        run: The run directory, with its ``environment.json``.
        config: Every value that applies.
        schema: Of the data set.
        record: The test record, see ``evaluate``.
    """
    environment = json.loads((run / "environment.json").read_text())
    sections = [
        f"# {run.name}",
        _about(config, schema, record),
        "## Scores\n\n" + _scores(record),
        "## Data\n\n" + _data(schema),
        "## How it was evaluated\n\n" + _protocol(config, record),
        "## Intended use\n\n" + _use(config, record),
        "## How to load it\n\n" + _load(run, config),
        "## What it was made with\n\n" + _made_with(environment),
    ]
    write_atomically(run / "card.md", "\n\n".join(sections) + "\n")


def _about(config: Config, schema: Schema, record: dict[str, Any]) -> str:
    network, optimizer = config.network, config.optimizer
    shape = f"{network.num_layers} layers of width {network.hidden_size} with {network.num_attention_heads} heads"
    preset = f", preset {network.preset}" if network.backbone == "hstu" else ""
    return (
        f"A {config.task} model: backbone {network.backbone}{preset}, {shape}, histories of at most "
        f"{config.dataset.max_history_seqlen:,} events, trained on {schema.name} with {optimizer.optimizer_str} at "
        f"learning rate {optimizer.learning_rate:g}, seed {config.trainer.seed}. The checkpoint is that of step "
        f"{record['step']:,}, chosen by {config.eval_metrics[0]} on the validation split. `operative.gin` has every "
        "value that applied."
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _scores(record: dict[str, Any]) -> str:
    errors, best = record.get("standard_errors") or {}, record.get("best_possible") or {}
    rows = []
    for name, value in record["metrics"].items():
        error = errors.get(name)
        row = [name + (" (less is better)" if lower_is_better(name) else "")]
        row += ["undefined" if value is None else f"{value:.4f}", "-" if error is None else f"{error:.4f}"]
        rows.append([*row, *([f"{best[name]:.4f}" if best.get(name) else "-"] if best else [])])
    header = ["test metric", "score", "standard error", *(["best possible"] if best else [])]
    return _table(header, rows) + (
        "\n\nA standard error says how far other users of the same kind would move the score of this trained model; "
        "other seeds move it too."
    )


def _data(schema: Schema) -> str:
    counts = schema.counts
    lines = [
        f"{schema.name}: {counts['users']:,} users, {counts['items']:,} items, {counts['events']:,} events; "
        f"{counts['seqlen_min']:,} to {counts['seqlen_max']:,} a user, {counts['seqlen_mean']:,.1f} on average."
    ]
    if schema.source:
        rows = [[f"`{name}`", f"`{digest}`"] for name, digest in schema.source.items()]
        lines.append(_table(["made from", "sha256"], rows))
    if schema.vocabularies:
        rows = [[f"`{name}`", f"`{digest}`"] for name, digest in schema.vocabularies.items()]
        lines.append(_table(["vocabulary", "identity"], rows))
    return "\n\n".join(lines)


def _protocol(config: Config, record: dict[str, Any]) -> str:
    facts = [f"Split: {config.dataset.protocol}, {record['num_targets']:,} targets of {record['num_users']:,} users."]
    if config.retrieval is not None:
        facts.append(f"Each target is ranked among {record['num_candidates']:,} items; ties count half.")
        seen = "are left out of the ranking" if record["filter_seen"] else "stay in the ranking"
        facts.append(f"Items that the user has met {seen}: {record.get('filter_seen_reason', 'as configured')}.")
        facts.append(f"{record['seen_targets']:,} targets are such items.")
    if record.get("untrained_targets"):
        facts.append(f"{record['untrained_targets']:,} targets are items that training never showed.")
    return "\n".join(f"- {fact}" for fact in facts)


def _use(config: Config, record: dict[str, Any]) -> str:
    limits = (
        "It knows the items of its vocabulary and no others, and the behaviour of its time: train it anew, or on from "
        "here with `--init-from`, as both change. It repeats what the log favours, popular items among it, and was not "
        "examined for groups of users: do that before decisions about people depend on it."
    )
    return f"{_USES[config.task]} {limits}"


def _load(run: Path, config: Config) -> str:
    return f'```python\nimport hstu\n\nrun = hstu.open_run("{run}")\n{_LOADS[config.task]}\n```'


def _made_with(environment: dict[str, Any]) -> str:
    versions = {"python": environment["python"], **environment["versions"]}
    machine = environment["devices"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    rows = [[name, version] for name, version in versions.items() if version]
    return f"{machine['cpu']}, {machine['cpu_count']} cores, {gpus}.\n\n" + _table(["package", "version"], rows)
