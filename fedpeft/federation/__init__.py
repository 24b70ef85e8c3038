"""Both ends of a round: the server's loop, the client's answer, what each keeps."""
