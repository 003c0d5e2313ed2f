"""The toy world: small enough to see, and to train on one GPU, what TurboDiffusion does."""
