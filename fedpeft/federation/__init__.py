"""Both ends of a round: the server's loop, the client's work, what each keeps."""
