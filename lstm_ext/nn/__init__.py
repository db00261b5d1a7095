"""The modules: names, parameters, conversion."""
