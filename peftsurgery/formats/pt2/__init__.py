"""Programs of torch.export, out."""
