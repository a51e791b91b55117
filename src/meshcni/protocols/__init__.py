"""Messages and connection states between our programs and their peers, without I/O."""
