"""Other people's formats, in and out.  Importing this package registers them beside our own."""

from epitaxy.core.files import inspect, load, save
from epitaxy.interop import adapter_plus, adaptformer, ast_petl, mosa, peft  # noqa: F401  (registers their formats)

__all__ = ["inspect", "load", "save"]
