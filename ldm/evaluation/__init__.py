"""Evaluation: how good a model's images of digits are, in figures that cannot all be faked at once.

One module per figure, each of pure functions of tensors: `prompt` (is it the digit that was asked for?), `style` (the
stroke weight and slant?), `frechet` and `precision_recall` (are the images distributed as real ones?), `diversity`
(within a class, too?), `memorisation` (or are they copies?), `autoencoder` (what does the first stage lose?).
`networks` holds the judge and the feature network, `reference` the real images' side of each comparison, and
`report` puts it together for `scripts/evaluate.py`.
"""
