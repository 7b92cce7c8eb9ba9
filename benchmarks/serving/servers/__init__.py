"""One file for each peer: the same network and the same work on an image, set up as the peer's own documents advise.

Each runs in its peer's environment, where of this project only what these files import can be relied on.
"""
