"""Teaching a model something new: DreamBooth, LoRA, textual inversion."""
