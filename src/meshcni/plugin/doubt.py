"""What keeps the API server's word from counting."""

from meshcni.errors import MeshCniError


class DoubtError(MeshCniError):
    """There is no answer that counts; `message` goes on after "the API server, asked instead, "."""
