"""Everything that deploy.py does, one module per line of it."""
