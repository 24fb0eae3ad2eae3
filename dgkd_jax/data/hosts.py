"""Checks quickly whether a host can be reached by name; without a network, libraries would retry for minutes."""

import contextlib
import socket
import threading

_LOOKUP_SECONDS = 3


def resolves(host: str) -> bool:
    """Whether the name `host` resolves; true if the answer is slow, because a slow network is still a network."""
    found = []

    def look_up():
        with contextlib.suppress(OSError):
            found.append(socket.getaddrinfo(host, 443))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_LOOKUP_SECONDS)
    return bool(found) or thread.is_alive()  # still waiting: a slow network
