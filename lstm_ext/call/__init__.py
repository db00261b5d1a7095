"""One call: the layouts and arguments of the user, turned into layers."""
