/**
 * A recipe: everything that decides an image, as the text that `ldm txt2img` writes into a PNG (`ldm/inference/recipe.py`).
 * `ldm txt2img --from-png FILE` remakes the image from it.
 */

/** Return the text of the PNG's chunk `parameters`. */
export function recipeText(made) {
  const [low, high] = made.interval ?? [0, Infinity];
  const entries = {
    Steps: made.steps,
    Sampler: made.sampler,
    "CFG scale": decimal(made.scale),
    Seed: made.seed,
    Size: `${made.width}x${made.height}`,
    "Model hash": made.source?.hash,
    Model: quoted(made.source?.name ?? ""),
    Index: 0,
    Spacing: quoted(String(made.spacing)),
    "Final sigma": made.finalSigma === "zero" ? undefined : made.finalSigma,
    Eta: decimal(made.eta),
    "Guidance interval": low === 0 && high === Infinity ? undefined : `${decimal(low)} to ${decimal(high)}`,
    Precision: "full",
    "Batch size": 1,
    "Batch pos": 0,
    Version: made.version,
  };
  const known = Object.entries(entries).filter(([, value]) => value !== undefined && value !== "");
  const negative = made.negative ? `\nNegative prompt: ${made.negative}` : "";
  return `${made.prompt}${negative}\n${known.map(([key, value]) => `${key}: ${value}`).join(", ")}`;
}

/** Write a number as Python writes a float. */
function decimal(number) {
  if (number === Infinity) return "inf";
  return Number.isInteger(number) ? `${number}.0` : String(number);
}

function quoted(text) {
  return /[,:"\n]/.test(text) ? JSON.stringify(text) : text;
}

/**
 * Return the bytes of a PNG with a text added before its image data.
 *
 * @param {Uint8Array} png
 * @param {string} text
 */
export function withText(png, text) {
  const latin = [...text].every((letter) => letter.codePointAt(0) < 256);
  const key = new TextEncoder().encode("parameters");
  const value = latin ? Uint8Array.from(text, (letter) => letter.codePointAt(0)) : new TextEncoder().encode(text);
  // tEXt is Latin-1: keyword, 0, text; iTXt is UTF-8: keyword, 0, two marks of no compression, two empty names
  const data = latin ? [...key, 0, ...value] : [...key, 0, 0, 0, 0, 0, ...value];
  const body = Uint8Array.from([...new TextEncoder().encode(latin ? "tEXt" : "iTXt"), ...data]);
  const header = 8 + 25; // the signature, and IHDR, which comes first
  return Uint8Array.from([
    ...png.subarray(0, header),
    ...big32(data.length),
    ...body,
    ...big32(checksum(body)),
    ...png.subarray(header),
  ]);
}

function big32(number) {
  return [24, 16, 8, 0].map((shift) => (number >>> shift) & 255);
}

/** CRC-32, as PNG's chunks have. */
function checksum(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let k = 0; k < 8; k++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}
