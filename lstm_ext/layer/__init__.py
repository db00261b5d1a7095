"""One layer: routes, operators, autograd, transforms, equations."""

from . import operators  # noqa: F401  (it waits for the extension, and then registers the fake kernels)
