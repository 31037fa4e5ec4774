"""The `loanmesh` command."""
