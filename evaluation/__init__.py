"""Training a network and measuring it: the one loop, metrics, recipes and protocols."""
