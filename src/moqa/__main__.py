"""`python -m moqa`."""

from moqa.cli import main

main()
