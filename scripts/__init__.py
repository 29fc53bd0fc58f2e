"""The jobs of the stack: `python -m scripts.<job>`."""
