"""How bytes travel between the server and its clients: in this process, or through Flower."""
