"""Stands in for supervisor, which is in the images and not in the development environment."""

import importlib.util
import sys
import types

if importlib.util.find_spec("supervisor") is None:
    package, childutils = types.ModuleType("supervisor"), types.ModuleType("childutils")
    # Its only name that tests meet; they put their own in its place.
    childutils.getRPCInterface = None
    package.childutils = childutils
    sys.modules["supervisor"] = package
