"""cotkit: one small function per published idea about fine-tuning chains of thought.

Choose the room by what you hold: ``dir(cotkit)`` lists the rooms, ``cotkit.find("length")`` searches.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from cotkit._index import find as find

__version__ = "0.1.0.dev0"
__all__ = sorted(["find", *(m.name for m in iter_modules(__path__) if not m.name.startswith("_"))])


def __getattr__(room: str) -> ModuleType:
    """Import a room, and the files of a folder, on first use: ``import cotkit`` itself stays instant."""
    if room not in __all__:
        raise AttributeError(f"module 'cotkit' has no room {room!r}; the rooms are {', '.join(__all__)}.")
    module = import_module(f"cotkit.{room}")
    for file in iter_modules(getattr(module, "__path__", ())):
        if not file.name.startswith("_"):
            import_module(f"cotkit.{room}.{file.name}")
    return module


def __dir__() -> list[str]:
    """List the rooms for Tab completion."""
    return [*__all__, "__version__"]
