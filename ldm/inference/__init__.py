"""Making images with a loaded model: recipes, drawing, and the files that come out."""
