"""The public operations: argument checks, dispatch to a tier, registration with torch.library."""
