/** Images {data, width, height} of RGBA bytes on canvases. */

/** Show an image on a canvas; `label` is its text alternative. */
export function paint(canvas, { data, width, height }, label) {
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
  if (label) canvas.setAttribute("aria-label", label);
  return canvas;
}

/** Return a canvas without an image yet: a new one, or this one, cleared. */
export function blank(label, canvas = document.createElement("canvas")) {
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  canvas.removeAttribute("width");
  canvas.removeAttribute("height");
  return canvas;
}
