"""Conditions for the UNet: prompts to tokens, tokens to CLIP's hidden states; classes, layouts and images."""
