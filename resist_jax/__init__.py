"""ResIST: layer-wise decomposition of ResNets for distributed training."""
