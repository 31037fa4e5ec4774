"""Pricing's process: settings, policy, serve. A policy that cannot be used stops the start."""

from __future__ import annotations

from lending.pricing.v1.pricing_service_pb2_grpc import add_PricingServiceServicer_to_server

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.server import Service, run
from loanmesh.runtime.setting_rules import WrongSetting
from services.pricing.policy import PolicyError, load_policy
from services.pricing.servicer import PricingServicer
from services.pricing.settings import PricingSettings


async def build(settings: PricingSettings, clock: Clock) -> Service:
    """Load the policy and put the service together."""
    try:
        policy = load_policy(settings.policy)
    except PolicyError as error:
        raise WrongSetting("PRICING_POLICY", str(error)) from error
    servicer = PricingServicer(policy, clock)
    return Service([(add_PricingServiceServicer_to_server, servicer)], ["lending.pricing.v1.PricingService"])


def main() -> None:
    """Run pricing until SIGTERM."""
    run("pricing", PricingSettings, build)


if __name__ == "__main__":
    main()
