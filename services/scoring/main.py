"""Scoring's process: settings, models, serve."""

from __future__ import annotations

from lending.scoring.v1.scoring_service_pb2_grpc import add_ScoringServiceServicer_to_server
from lending.type.v1.party_pb2 import Party

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.server import Service, run
from services.scoring.model import load_model
from services.scoring.servicer import ScoringServicer
from services.scoring.settings import ScoringSettings


async def build(settings: ScoringSettings, clock: Clock) -> Service:
    """Load the models and put the service together."""
    models = {
        Party.KIND_PERSON: load_model(settings.consumer_model),
        Party.KIND_FIRM: load_model(settings.firm_model),
    }
    servicer = ScoringServicer(models, clock)
    return Service([(add_ScoringServiceServicer_to_server, servicer)], ["lending.scoring.v1.ScoringService"])


def main() -> None:
    """Run scoring until SIGTERM."""
    run("scoring", ScoringSettings, build)


if __name__ == "__main__":
    main()
