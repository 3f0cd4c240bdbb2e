"""`python -m moqa`."""

from moqa.cli.main import main

main()
