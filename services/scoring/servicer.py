"""The scoring RPCs: proto in, numpy in the middle, proto out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from lending.scoring.v1 import scoring_service_pb2 as pb
from lending.scoring.v1.scoring_service_pb2_grpc import ScoringServiceServicer
from lending.type.v1.party_pb2 import Party

from loanmesh.runtime.apart import each_apart
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import LoanmeshError, MissingEvidence
from loanmesh.runtime.status import item_status
from loanmesh.runtime.validation import refusal
from services.scoring.calibration import grade, points, probability
from services.scoring.features import Features, features
from services.scoring.model import Model
from services.scoring.reasons import add_reasons
from services.scoring.scorecard import contributions, log_odds

_Context = grpc.aio.ServicerContext[Any, Any]


class ScoringServicer(ScoringServiceServicer):
    """Scores batches: one pass through the tables a model, however many profiles."""

    def __init__(self, models: Mapping[Party.Kind.ValueType, Model], clock: Clock) -> None:
        self._models = models
        self._clock = clock

    async def ScoreProfiles(self, request: pb.ScoreProfilesRequest, context: _Context) -> pb.ScoreProfilesResponse:
        """One score an item, or why there is none."""
        return await each_apart(request.items, self._score, _refused)

    async def _score(self, items: Sequence[pb.ScoreProfilesRequest.Item]) -> pb.ScoreProfilesResponse:
        response = pb.ScoreProfilesResponse()
        for item in items:
            response.results.add(key=item.key)
        rows: dict[Party.Kind.ValueType, list[tuple[int, Features]]] = {kind: [] for kind in self._models}
        for index, item in enumerate(items):
            if error := refusal(item):
                response.results[index].error.CopyFrom(item_status(error))
                continue
            try:
                rows[item.party_kind].append((index, features(self._models[item.party_kind], item.profile)))
            except MissingEvidence as missing:
                response.results[index].error.CopyFrom(item_status(missing))
        scored_at = Timestamp()
        scored_at.FromDatetime(self._clock.now())
        for kind, found in rows.items():
            if found:
                model = self._models[kind]
                parts = contributions(model, np.array([seen.values for _, seen in found]))
                totals = log_odds(model, parts).tolist()
                for (index, seen), total, shares in zip(found, totals, parts.tolist(), strict=True):
                    _tell(response.results[index].score, model, total, shares, seen, scored_at)
        return response

    async def ListModels(self, request: pb.ListModelsRequest, context: _Context) -> pb.ListModelsResponse:
        """The models in force, with their cards."""
        return pb.ListModelsResponse(
            models=[
                pb.Model(
                    model=m.name,
                    model_hash=m.hash,
                    party_kind=kind,
                    card=m.card,
                    required_sources=sorted(m.required_sources),
                )
                for kind, m in self._models.items()
            ]
        )


def _tell(
    score: pb.Score, model: Model, total: float, parts: Sequence[float], seen: Features, scored_at: Timestamp
) -> None:
    score.pd = pd = probability(total)
    score.points = points(pd)
    score.grade = grade(pd, model.bands)
    add_reasons(score, parts, model.features, seen.state)
    score.intercept = model.intercept
    score.model = model.name
    score.model_hash = model.hash
    score.score_time.CopyFrom(scored_at)


def _refused(item: pb.ScoreProfilesRequest.Item, error: LoanmeshError) -> pb.ScoreProfilesResponse:
    return pb.ScoreProfilesResponse(results=[pb.ScoreProfilesResponse.Result(key=item.key, error=item_status(error))])
