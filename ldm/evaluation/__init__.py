"""Evaluation: how good a model's images are, in figures that cannot all be faked at once.

One module for each figure, of pure functions of tensors: `prompt` (is it the digit asked for?), `style` (the stroke
weight and slant asked for?), `frechet` and `precision_recall` (are the images distributed as real ones?), `diversity`
(within a class, too?), `memorisation` (or are they copies?), `autoencoder` (what does the first stage lose?),
`likelihood` (how many bits does an image cost?), `dreambooth`. `networks` has the judge and the feature network,
`reference` the real images' side of each comparison, `report` the figures together, and `commands` what
`scripts/evaluate.py` does with them. These are for digits; `own_data` measures on a folder of images, `scenes` and
`emoji` (by `emoji_judge`) colour models. `quality` is for trainings, and `doctor` examines a run.
"""
