"""What every distillation method shares: the contract, the problem, the outer loop, the driver."""
