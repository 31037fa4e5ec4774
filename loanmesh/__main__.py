"""`python -m loanmesh` is the `loanmesh` command."""

from loanmesh.cli.main import main

main()
