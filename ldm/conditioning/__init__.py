"""What the UNet is told: prompts as tokens, tokens as CLIP's hidden states."""
