"""The fixtures of routes.py, for the files that test routes."""

from routes import events, kernel_calls, layer, taken, x  # noqa: F401
