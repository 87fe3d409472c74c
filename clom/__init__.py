"""CLoM: a contrastive loss of pre-trained models for DC, DSA and DM (arXiv 2310.03295)."""
