"""The one import an internal caller needs.

    async with Client("127.0.0.1:7401", lender="lenders/demo") as client:
        application = await client.submit(request, wait_s=2)

Every change carries a request_id, so that a retry is safe; a call that finds the mesh busy or away is repeated until
`patience_s` is over. This is the only layer that repeats a caller's calls.
"""

from loanmesh.client.client import CallFailed, Client, Unreachable

__all__ = ["CallFailed", "Client", "Unreachable"]
