"""`python -m agent.cli`: the `skerry` command where its script is not on the path."""

from agent.cli import main

main()
