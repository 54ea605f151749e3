"""Data modules: CIFAR-10 and the embedded handwritten digits."""
