"""Bodies of requests and answers: names, types, and what they mean to a client."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr


def _writable(text: str) -> str:
    """Refuse what no file could hold: half of a pair of characters."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("holds half of a surrogate pair, which is no character")
    return text


Text = Annotated[StrictStr, AfterValidator(_writable)]
Whole = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Id = Text | Whole
Single = StrictBool | Whole | Number | Text | None
Value = Single | list[Single]
Row = dict[Text, Value]
Event = Row | Id


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Asking(_Body):
    """Who asks, after which events, and when."""

    user: Id | None = Field(None, description="a user of the data set")
    events: list[Event] = Field([], description="what the user did after the data set was made")
    history: list[Event] | None = Field(
        None, description="in place of a user: the events of any user, as rows of the log, or as items alone"
    )
    features: Row = Field({}, description="beside a history: what the model reads of the user, by column of the log")
    request_time: Id | None = Field(None, description='seconds, an ISO date, or "now"; default: at the last event')
    unknown_items: Literal["error", "drop"] = Field("error", description="what to do with events of unknown items")
    missing_features: Literal["error", "allow"] = Field("error", description="what to do where features are missing")


class Recommend(Asking):
    """The best items of a user."""

    k: Annotated[StrictInt, Field(ge=1)] = Field(10, description="items")
    filter_seen: StrictBool | None = Field(None, description="leave out seen items; default: as evaluated")
    candidates: list[Id] | None = Field(None, description="items that may be returned; default: all")


class Score(Asking):
    """Scores of given items."""

    candidates: list[Event] = Field(min_length=1, description="items, or rows of the log with what is known of them")


class Similar(_Body):
    """Items that are close to others."""

    items: list[Id] = Field(min_length=1, description="items of the data set")
    k: Annotated[StrictInt, Field(ge=1)] = Field(10, description="neighbours of each")


class Items(BaseModel):
    """Items, best first."""

    step: int = Field(description="of the checkpoint that answered")
    items: list[dict[str, Any]] = Field(description="item, score and the control columns of each, best first")


class Scored(BaseModel):
    """Scores, in the order of the candidates."""

    step: int = Field(description="of the checkpoint that answered")
    scores: list[dict[str, Any]] = Field(description="item and score of each; score_<name> where there are several")


class Neighbours(BaseModel):
    """The neighbours of each item, in the order of the items."""

    step: int = Field(description="of the checkpoint that answered")
    similar: list[dict[str, Any]] = Field(description="item, and its neighbours with item and score, closest first")
