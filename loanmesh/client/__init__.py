"""The one import an internal caller needs.

    async with Client("127.0.0.1:7401", lender="lenders/demo") as client:
        answer = await client.submit_and_wait(application, deadline_s=2)

Every change carries a request_id, so that a retry is safe; a call that finds the mesh busy or away is repeated, within
a retry budget, until the caller's deadline. No more calls are in flight than the mesh answers without a queue; the
others wait here, the most urgent first. This is the only layer that repeats a caller's calls. Examples: docs/client.md.
"""

from loanmesh.client.client import Client
from loanmesh.client.errors import CallFailed, Overloaded, TlsFailed, Unreachable
from loanmesh.client.results import Decided, Pending, Refused, Submitted
from loanmesh.client.security import Security
from loanmesh.client.sync import SyncClient

__all__ = [
    "CallFailed",
    "Client",
    "Decided",
    "Overloaded",
    "Pending",
    "Refused",
    "Security",
    "Submitted",
    "SyncClient",
    "TlsFailed",
    "Unreachable",
]
