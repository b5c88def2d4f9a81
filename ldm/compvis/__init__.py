"""CompVis's call signatures over the core, for research code that was written against its `ldm` package."""
