"""The compiled library: finding, building and loading it."""
