"""Loanmesh: a gRPC mesh that decides loan applications."""

__version__ = "0.1.0"
