"""Rival (b): the same mesh as most would write it first, with grpc.aio's defaults and ordinary retries."""
