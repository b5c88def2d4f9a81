"""Networks that people learn diffusion from, as they are taught: plain enough to read in a few minutes each."""
