"""The fixtures of routes.py, for the files that test routes."""

from routes import events, layer, taken, x  # noqa: F401
