"""A Flower app with FedHQ as its strategy."""
