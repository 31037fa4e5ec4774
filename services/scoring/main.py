"""Scoring's process: settings, models, serve."""

from __future__ import annotations

from lending.scoring.v1.scoring_service_pb2_grpc import add_ScoringServiceServicer_to_server
from lending.type.v1.party_pb2 import Party

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.server import Service, run
from loanmesh.runtime.setting_rules import WrongSetting
from services.scoring.model import Model, ModelError, load_model
from services.scoring.servicer import ScoringServicer
from services.scoring.settings import ScoringSettings


async def build(settings: ScoringSettings, clock: Clock) -> Service:
    """Load the models and put the service together."""
    models = {
        Party.KIND_PERSON: _model("SCORING_CONSUMER_MODEL", settings.consumer_model, "person"),
        Party.KIND_FIRM: _model("SCORING_FIRM_MODEL", settings.firm_model, "firm"),
    }
    servicer = ScoringServicer(models, clock)
    return Service([(add_ScoringServiceServicer_to_server, servicer)], ["lending.scoring.v1.ScoringService"])


def _model(setting: str, name: str, party_kind: str) -> Model:
    try:
        model = load_model(name)
    except ModelError as error:
        raise WrongSetting(setting, str(error)) from error
    if model.party_kind != party_kind:
        raise WrongSetting(setting, f"{name} scores a {model.party_kind}", f"a model that scores a {party_kind}")
    return model


def main() -> None:
    """Run scoring until SIGTERM."""
    run("scoring", ScoringSettings, build)


if __name__ == "__main__":
    main()
