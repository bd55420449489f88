"""`python -m ivlens` is the command line."""

from ivlens.cli import app

if __name__ == "__main__":
    app()
