"""What the entry point ``verl.plugins`` loads: importing this file registers cotkit's names with verl.

Only verl imports it. verl itself notes a plugin's failure at the level DEBUG alone and goes on, until a run
asks for a name that is not there; here it is said aloud first.
"""

import logging
from importlib.util import find_spec

from cotkit.interop import verl

if find_spec("verl") is not None:
    try:
        verl.register()
    except Exception:
        logging.getLogger(__name__).warning(
            "cotkit is not registered with verl: no cotkit_* estimators and losses.", exc_info=True
        )
        raise
