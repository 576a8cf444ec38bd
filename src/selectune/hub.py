"""Whether a hub can be reached.

Knows: that a name which nobody can resolve is not there, unless a proxy resolves it. Does not know: models and data.
"""

from __future__ import annotations

import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies


@cache
def hub_is_there() -> bool:
    """Whether asking the hub makes sense; where its name is unknown, libraries are told not to go on asking for half a minute."""
    import datasets
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies():
        return not constants.HF_HUB_OFFLINE
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return False
    return True
