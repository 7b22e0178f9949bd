"""Models: what is trained, and the loss. They know nothing of ranks."""

from hstu.config import Config
from hstu.data.schema import Schema
from hstu.models.binding import fit_to_data, make_collator
from hstu.models.encoder import Encoder
from hstu.models.masked import MaskedRetrievalModel
from hstu.models.permuted import PermutedRetrievalModel
from hstu.models.ranking import RankingModel
from hstu.models.replaced import ReplacedRetrievalModel
from hstu.models.retrieval import RetrievalModel

__all__ = ["Encoder", "RankingModel", "RetrievalModel", "build_model", "fit_to_data", "make_collator"]


_MASKED = {
    "masked": MaskedRetrievalModel,
    "permuted": PermutedRetrievalModel,
    "replaced": ReplacedRetrievalModel,
}


def build_model(config: Config, schema: Schema, *, allocate_tables: bool = True) -> RankingModel | RetrievalModel:
    """Build the model of ``config.task`` for data sets of ``schema``, dense weights drawn from the run's seed."""
    import torch

    cls: type[RankingModel] | type[RetrievalModel] = RankingModel
    if config.retrieval is not None:
        cls = _MASKED[config.retrieval.objective] if config.network.is_masked else RetrievalModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.trainer.seed)
        return cls(config, schema, allocate_tables=allocate_tables)
