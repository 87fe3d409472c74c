"""From raw data sets to prepared tensors; the command is `python -m data.prepare`."""
