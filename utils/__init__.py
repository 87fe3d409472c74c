"""Small shared parts with one job each: errors, flags, seeds, devices, files, optimisers, logs."""
