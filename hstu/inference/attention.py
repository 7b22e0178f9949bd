"""Who attends to whom for a few users: the weights that the layers used, as tensors, names and a picture."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hstu.config.backbones import RECOMPUTE, of_fused_layer
from hstu.data.batch import Batch
from hstu.data.reader import Histories
from hstu.data.splits import Split
from hstu.inference.export import new_directory
from hstu.inference.opened import Opened
from hstu.inference.prediction_requests import PredictionRequests, RequestSpec, make_prediction_requests
from hstu.models import RankingModel, RetrievalModel
from hstu.models.lookup import Lookup
from hstu.ops import positions_in_sequence

logger = logging.getLogger(__name__)

WHOLE_LAYERS = ("NetworkArgs.recompute = 'none'", *(f"NetworkArgs.{name} = False" for name in RECOMPUTE))
"""Bindings to open a run with: a layer that computes in one operation shows no weights."""
_WIDEST = 256  # head that attention takes
_NAMED = 40  # tokens that still have room for their names
_HIDDEN = "?"


@torch.no_grad()
def write_attention(opened: Opened, spec: RequestSpec, output: Path, num_users: int) -> None:
    """Write the attention of the first ``num_users`` requests of ``spec`` into a new directory; all ranks call it.

    - ``attention.safetensors``: of user i (from 0) and layer l ``i/layer<l>``, [H, n, n] float32: what row, column
      multiplies the value of the column's token with. Softmax rows sum to one; those of HSTU are SiLU divided by
      ``scaling_seqlen``. The last of the n tokens is the one that answers.
    - ``attention.json``: the run, and of each user the id and the names of the n tokens.
    - ``attention.png``: means over heads.

    Raises:
        ValueError: for a backbone without such weights, an output that is there, and requests that do not fit.
    """
    require_weights(opened)
    if num_users < 1:
        raise ValueError(f"--num_users = {num_users}: must be at least 1")
    if spec.split == "future" and opened.config.task == "ranking":
        raise ValueError("--split = 'future': a ranking run scores given events; use test or valid")
    requests, mesh = make_prediction_requests(spec, opened), opened.assembly.mesh
    tensors: dict[str, Tensor] = {}
    users: list[dict[str, Any]] = []
    opened.model.eval()
    for row in range(min(num_users, len(requests.split))):
        request, layers = _attention_of_row(opened, requests.dataset, requests.split, row)
        if not layers:
            continue  # nothing is asked of a user without a history
        tensors |= {f"{len(users)}/layer{number}": weights for number, weights in enumerate(layers)}
        names = token_names(opened, requests, request)[: layers[0].shape[1]]
        users.append({"user": requests.users[row].as_py(), "tokens": names})
    if not users:
        raise ValueError("--users: none of them has an event; choose others")
    about = opened.about | {"split": spec.split, "users": users}
    with new_directory(output, mesh) as folder:
        if mesh.is_main:
            save_file(tensors, folder / "attention.safetensors")
            (folder / "attention.json").write_text(json.dumps(about, indent=1, default=str) + "\n")
            _draw(tensors, users, folder / "attention.png")
    logger.info("%s: attention of %d users", output, len(users))


@torch.no_grad()
def attention_pictures(opened: Opened, split: Split, rows: np.ndarray, longest: int) -> list[bytes | None]:
    """Return PNG files of the attention of test samples, or None where there is none to show; all ranks call it.

    The layers stand side by side, means over heads, as bright as they are large, of either sign; of masked items the
    row that is predicted is the last one.

    Args:
        opened: Opened with ``WHOLE_LAYERS``.
        split: Samples of its data set.
        rows: Of the split.
        longest: Most events of a sample that is drawn.
    """
    if not has_weights(opened):
        return [None] * len(rows)
    opened.model.eval()
    lengths = np.minimum(split.stop[rows], opened.config.dataset.max_history_seqlen)
    short = [int(row) if length <= longest else None for row, length in zip(rows, lengths, strict=True)]
    found = [[] if row is None else _attention_of_row(opened, opened.dataset, split, row)[1] for row in short]
    return [_png(layers) if layers else None for layers in found]


def _attention_of_row(opened: Opened, dataset: Histories, split: Split, row: int) -> tuple[Lookup, list[Tensor]]:
    """Return what was asked of one sample, and of each layer [H, n, n] up to the last token that answers, if one does.

    Every rank runs the same sample, for lookups are collective.
    """
    rows = np.array([row])
    batch = opened.loader.collate(dataset, split, rows, rows, 0).to(opened.assembly.mesh.device)
    request, layers = attention_of(opened.model, batch)
    if request.rows.numel() == 0:
        return request, []
    length = int(request.rows[-1]) + 1
    return request, [weights[:length, :, :length].transpose(0, 1).contiguous().cpu() for weights in layers]


def _png(layers: list[Tensor]) -> bytes:
    from matplotlib import colormaps
    from matplotlib.image import imsave

    means = [weights.mean(0).abs() for weights in layers]  # SiLU lets weights be negative
    squares = [colormaps["viridis"]((mean / mean.max().clamp(min=1e-12)).numpy()) for mean in means]
    gap = np.ones((len(squares[0]), 1, 4)) * (1, 1, 1, 0)
    picture = np.concatenate([part for square in squares for part in (square, gap)][:-1], 1)
    imsave(file := BytesIO(), picture, format="png")
    return file.getvalue()


def has_weights(opened: Opened) -> bool:
    """Return whether the layers of the backbone have attention weights to show."""
    layers = getattr(opened.model.backbone, "layers", None)
    return isinstance(layers, nn.ModuleList) and all(hasattr(layer, "attention") for layer in layers)


def require_weights(opened: Opened) -> None:
    """Raise ``ValueError`` for a backbone whose layers have no attention weights to show."""
    if not has_weights(opened):
        name = opened.config.network.backbone
        raise ValueError(
            f"NetworkArgs.backbone = {name!r}: shows no attention weights; hstu, sasrec, llama and bert do"
        )
    if of_fused_layer(opened.config.network):
        raise ValueError(f"layers in one operation show no weights; open the run with {'; '.join(WHOLE_LAYERS)}")


def attention_of(model: RankingModel | RetrievalModel, batch: Batch) -> tuple[Lookup, list[Tensor]]:
    """Run ``model`` as evaluation does, and return what it asked and of each layer the weights [T, H, n].

    Row i of a token holds what the token multiplies the value of the i-th token of its sample with.
    """
    with _recorded(model.backbone) as layers:
        request = model.scoring_request(batch)
        if isinstance(model, RankingModel):
            model.predictions(request)
        else:
            model.queries(request)  # type: ignore[arg-type]
    return request, layers


@contextmanager
def _recorded(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """Let every attention also run over one-hot values, whose outputs are its weights."""
    found: list[Tensor] = []

    def recording(attend: Any) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, layout: Any, mask: Any, **options: Any) -> Tensor:
            place, parts = positions_in_sequence(layout.offsets, v.shape[0]), []
            for first in range(0, layout.longest, _WIDEST):
                columns = torch.arange(first, min(first + _WIDEST, layout.longest), device=v.device)
                one_hot = (place[:, None] == columns).to(v.dtype)[:, None].expand(-1, v.shape[1], -1).contiguous()
                parts.append(attend(q, k, one_hot, layout, mask, **options).float())
            found.append(torch.cat(parts, 2))
            out: Tensor = attend(q, k, v, layout, mask, **options)
            return out

        return run

    layers: Any = backbone.layers
    kept = [layer.attention for layer in layers]
    try:
        for layer, attend in zip(layers, kept, strict=True):
            layer.attention = recording(attend)
        yield found
    finally:
        for layer, attend in zip(layers, kept, strict=True):
            layer.attention = attend


def token_names(opened: Opened, requests: PredictionRequests, request: Lookup) -> list[str]:
    """Return what each token is: original values, ``?`` for an item that is to be predicted."""
    stream, batch = request.stream, request.batch
    parts: list[list[str]] = [[] for _ in range(stream.timestamps.numel())]
    for feature, rows in stream.feature_rows.items():
        values: list[str] = [feature] * rows.numel()
        if feature in batch.features.keys() and batch.ids(feature).numel() == rows.numel():  # noqa: SIM118
            values = _originals(opened, requests, feature, batch.ids(feature).tolist())
        for row, value in zip(rows.tolist(), values, strict=True):
            parts[row].append(value)
    if stream.memory is not None:
        for row, token in zip(*(own.tolist() for own in stream.memory), strict=True):
            parts[row].append(f"memory {token}")
    if opened.config.network.is_masked:
        for row in request.rows.tolist():
            parts[row] = [_HIDDEN]
    return [", ".join(part) for part in parts]


def _originals(opened: Opened, requests: PredictionRequests, feature: str, ids: list[int]) -> list[str]:
    if feature == opened.dataset.schema.item.name:
        return [str(value) for value in requests.vocabulary.take(ids).to_pylist()]
    try:
        known = opened.dataset.vocabulary(feature)
    except ValueError:  # bit masks stand for themselves
        return [f"{feature} {number}" for number in ids]
    return [f"{feature} {known[number] if number < len(known) else 'unknown'}" for number in ids]


def _draw(tensors: dict[str, Tensor], users: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    number = len(tensors) // len(users)
    figure = Figure(figsize=(4.5 * number, 4.2 * len(users)), layout="constrained")
    axes = figure.subplots(len(users), number, squeeze=False)
    for row, user in enumerate(users):
        for layer, axis in enumerate(axes[row]):
            image = axis.imshow(tensors[f"{row}/layer{layer}"].mean(0).numpy(), cmap="viridis", interpolation="nearest")
            figure.colorbar(image, ax=axis, shrink=0.8)
            axis.set_title(f"user {user['user']}, layer {layer}", fontsize=9)
            if len(user["tokens"]) <= _NAMED:
                ticks = range(len(user["tokens"]))
                axis.set_xticks(ticks, user["tokens"], rotation=90, fontsize=6)
                axis.set_yticks(ticks, user["tokens"], fontsize=6)
    figure.savefig(path, dpi=110)
