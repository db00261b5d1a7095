"""One layer: routes, operators, autograd, transforms, equations."""
