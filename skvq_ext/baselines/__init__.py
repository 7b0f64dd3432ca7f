"""Other methods of the literature under this library's protocol: simulated, for evaluation only."""
