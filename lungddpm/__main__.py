"""`python -m lungddpm`: the command line."""

from lungddpm.cli import main

main()
