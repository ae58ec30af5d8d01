"""ResIST: layer-wise decomposition of ResNets for distributed training."""

__version__ = '0.1.0'
