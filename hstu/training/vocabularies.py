"""Which vocabularies a run was trained on: said by its checkpoints, kept in its directory, asked for by who goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hstu.config import Config
from hstu.data.schema import ITEM_FEATURE, SCHEMA_FILE, VOCABULARY_DIR, Schema
from hstu.data.vocabulary import Vocabularies
from hstu.models import Encoder, RankingModel
from hstu.training.checkpoint_files import CheckpointError

Record = dict[str, dict[str, Any]]
"""Vocabulary -> ``size``, ``identity``, and whether weights are ``embedded`` by its ids; JSON values."""


def describe_vocabularies(vocabularies: Vocabularies, embedded: Iterable[str]) -> Record:
    """Return what a checkpoint says of the vocabularies of a data set, of which a model embeds some.

    The others (users, and which item is of which category) matter to who resumes a run alone.
    """
    schema = vocabularies.schema
    names = dict.fromkeys([*embedded, schema.user.name, schema.item.name])
    record = {name: _entry(vocabularies, name, embedded=name in {*embedded}) for name in names}
    kept = {name: known for name, known in schema.vocabularies.items() if name.startswith(ITEM_FEATURE)}
    return record | {
        name: {"size": schema.item.vocab_size, "identity": known, "embedded": False} for name, known in kept.items()
    }


def _entry(vocabularies: Vocabularies, name: str, *, embedded: bool) -> dict[str, Any]:
    return {"size": vocabularies.size(name), "identity": vocabularies.identity(name), "embedded": embedded}


def recorded_vocabularies(marker: dict[str, Any], user: str) -> Record:
    """Return what a checkpoint says of its vocabularies; of versions that said only their sizes, those.

    Args:
        marker: What the checkpoint says of itself.
        user: Name of the user feature.
    """
    found: Record | None = marker.get("vocabularies")
    if found is not None:
        return found
    sizes = marker["model"].get("tables", {})
    return {name: {"size": size, "identity": None, "embedded": name != user} for name, size in sizes.items() if size}


def require_same_vocabularies(checkpoint: Path, marker: dict[str, Any], here: Vocabularies, *, resume: bool) -> None:
    """Raise ``CheckpointError`` unless ids mean what they meant to the run of ``checkpoint``.

    Args:
        checkpoint: Where it is.
        marker: What it says of itself.
        here: The vocabularies of the data set at hand.
        resume: Whether training goes on, which also needs the users and the categories of items to be the same.
    """
    for name, there in recorded_vocabularies(marker, here.schema.user.name).items():
        if not there["embedded"] and not resume:
            continue
        problem = _difference(name, there, here)
        if problem is not None:
            raise CheckpointError(
                f"checkpoint {checkpoint} was trained on another vocabulary of {name!r} than {here.path} has now "
                f"({problem}), so ids would be taken for others: use the data set that it was trained on, or start a "
                "new run from its weights with --init-from and another --run-dir"
            )


def _difference(name: str, there: dict[str, Any], here: Vocabularies) -> str | None:
    is_category = name.startswith(ITEM_FEATURE)
    size = here.schema.item.vocab_size if is_category else here.size(name)
    if size is None or (is_category and name not in here.schema.vocabularies):
        return "there is none"
    if size != there["size"]:
        return f"{size:,} values instead of {there['size']:,}"
    known = here.schema.vocabularies[name] if is_category else here.identity(name)
    if there["identity"] is not None and known != there["identity"]:
        return "as many values, but others or in another order"
    return None


def keep_vocabularies(vocabularies: Vocabularies, record: Record, run: Path) -> None:
    """Keep the vocabularies that a model embeds in ``run``, with their schema: a data set may be made anew.

    Raises:
        ValueError: If one of them is damaged, or cannot be written.
    """
    identities = {
        name: entry["identity"]
        for name, entry in record.items()
        if entry["embedded"] and not vocabularies.stands_for_itself(name)
    }
    if kept_vocabularies(run, identities) is not None:
        return
    partial = run / f".{VOCABULARY_DIR}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / VOCABULARY_DIR).mkdir(parents=True)
        schema = replace(vocabularies.schema, vocabularies={**vocabularies.schema.vocabularies, **identities})
        schema.save(partial)
        copy = Vocabularies(partial, schema)
        for name in identities:
            vocabularies.check(name)
            shutil.copyfile(vocabularies.file(name), copy.file(name))
            copy.check(name)
        (run / SCHEMA_FILE).unlink(missing_ok=True)  # which comes last: without it no vocabularies are here
        shutil.rmtree(run / VOCABULARY_DIR, ignore_errors=True)
        os.replace(partial / VOCABULARY_DIR, run / VOCABULARY_DIR)
        os.replace(partial / SCHEMA_FILE, run / SCHEMA_FILE)
    except OSError as error:
        raise ValueError(f"{run}: cannot keep the vocabularies ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def kept_vocabularies(run: Path, identities: dict[str, str]) -> Vocabularies | None:
    """Return the vocabularies that ``run`` keeps if they are those of ``identities``, else None."""
    if not (run / SCHEMA_FILE).is_file():
        return None
    kept = Vocabularies(run, Schema.load(run))
    same = all(kept.schema.vocabularies.get(name) == known for name, known in identities.items())
    return kept if same and all(kept.file(name).is_file() for name in identities) else None


def embedded_features(config: Config, model: Encoder, schema: Schema) -> tuple[str, ...]:
    """Return the features whose ids choose weights of ``model``, or are what it predicts."""
    names = [table.name for table in model.embeddings.tables] + [*model.row_weights.values()]
    if isinstance(model, RankingModel):
        tables = {feature.name: feature.table for feature in schema.features}
        names += [tables[task.feature] or task.feature for task in model.tasks if not task.is_number]
    return tuple(dict.fromkeys(names))
