"""A conversation in the room: this machine's microphone, speaker, camera and terminal."""
