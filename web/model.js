/**
 * A model that onnxruntime computes: prompts to latents to pixels, by the same steps as `ldm.generate`.
 *
 * It is a folder that `ldm convert MODEL FOLDER --format onnx` writes (`ldm/onnx/model.py`): `model.json`, and the networks
 * text, unet and decoder. This file knows nothing of a page or of files: networks are functions from arrays to arrays.
 */

import { AttentionMaps, greyOf, wordsOf } from "./attention.js";
import { NormalGenerator } from "./noise.js";
import { cut, weigh } from "./prompt.js";
import { SAMPLERS, sample } from "./samplers.js";
import { Schedule, samplingSigmas } from "./schedule.js";
import { Tokenizer } from "./tokenizer.js";

const ENCODED = 64; // prompts that are kept

/** x0 = skip x + out output, for x = x0 + sigma noise: as `scalings` of `ldm/diffusion/denoiser.py`. */
const SCALINGS = {
  eps: (sigma) => [1, -sigma],
  x0: () => [0, 1],
  v: (sigma) => [1 / (1 + sigma * sigma), -sigma / Math.sqrt(1 + sigma * sigma)],
  flow: (sigma) => [1 / (1 + sigma), -sigma / (1 + sigma)],
};

export class Model {
  /**
   * @param {object} config of model.json
   * @param {Record<string, (inputs: object) => Promise<object>>} networks by name; arrays are {data, dims}
   */
  constructor(config, networks) {
    Object.assign(this, { config, networks, schedule: new Schedule(config.alphas_cumprod) });
    this.tokenizer = config.tokenizer && new Tokenizer(config.tokenizer);
    this.encoded = new Map();
  }

  /** Return the settings of a run: those that are given, the others from the model. */
  settings(given) {
    const own = this.config.defaults;
    const sampler = given.sampler ?? (own.sampler in SAMPLERS ? own.sampler : "ddim");
    return {
      ...{ prompt: "", negative: "", seed: 0, ...given, sampler },
      steps: given.steps ?? own.steps,
      scale: given.scale ?? own.scale,
      interval: own.interval ?? [0, Infinity],
      spacing: own.spacing ?? "trailing",
      finalSigma: own.final_sigma ?? "zero",
      eta: SAMPLERS[sampler].eta,
      width: given.width ?? own.width,
      height: given.height ?? own.height,
      strength: given.strength ?? (given.mask ? 1 : 0.75),
    };
  }

  /**
   * Return where sampling starts: {x, sigmas, denoise}. From noise, or from an image that is noised by `strength` of the
   * steps; under a mask, only its part is made anew (`ldm/init_image.py`).
   */
  async start(made, noise, sigmas, denoise) {
    const pure = noise.map((value) => value * Math.sqrt(1 + sigmas[0] ** 2));
    if (!made.init) return { x: pure, sigmas, denoise };
    const taken = Math.max(Math.floor(Number((made.strength * made.steps).toFixed(6))), made.strength > 0 ? 1 : 0);
    sigmas = sigmas.slice(made.steps - taken);
    const known = await this.encode(made.init);
    const noised = known.map((value, i) => value + sigmas[0] * noise[i]);
    if (!made.mask) return { x: noised, sigmas, denoise };
    const anew = this.pooled(made.mask, made);
    const masked = async (x, sigma) => (await denoise(x, sigma)).map((value, i) => (anew(i) ? value : known[i]));
    const mixed = noised.map((value, i) => (anew(i) ? noise[i] * Math.sqrt(1 + sigmas[0] ** 2) : value));
    return { x: made.strength < 1 ? noised : mixed, sigmas, denoise: masked };
  }

  /** Return a function that says of each number of the latents whether a pixel of its place is marked in the mask. */
  pooled(mask, { width, height }) {
    const f = this.config.downsampling;
    const [columns, area] = [width / f, (width / f) * (height / f)];
    const found = new Uint8Array(area);
    mask.forEach((marked, i) => {
      if (marked) found[Math.floor(Math.floor(i / width) / f) * columns + Math.floor((i % width) / f)] = 1;
    });
    return (i) => found[i % area];
  }

  /** Encode an image {data, width, height} of RGBA bytes to latents, the mode of its posterior. */
  async encode({ data, width, height }) {
    const area = width * height;
    const channels = this.config.image_channels;
    const pixels = new Float32Array(channels * area);
    for (let i = 0; i < area; i++) {
      const colours = data.subarray(4 * i, 4 * i + 3);
      const values = channels === 1 ? [greyOf(...colours)] : colours;
      values.forEach((value, k) => (pixels[k * area + i] = value / 127.5 - 1));
    }
    const { latents } = await this.networks.encoder({ pixels: { data: pixels, dims: [1, channels, height, width] } });
    return latents.data;
  }

  /** Yield {index, sigma, seen, predicted, latents} after each step of one image: what the network saw at noise level
   * sigma, what it predicted, and what the step reached, as latents for `decode`. `maps` collect its attention. */
  async *generate(given, maps = new AttentionMaps()) {
    const made = this.settings(given);
    if (/^Negative prompt: /mu.test(made.prompt)) // a recipe could not be read again
      throw new Error("a line of the prompt starts with “Negative prompt: ”: there is a field for that");
    const size = [this.config.channels, made.height / this.config.downsampling, made.width / this.config.downsampling];
    const count = size.reduce((a, b) => a * b);
    const noise = noiseOf(made, count);
    const levels = samplingSigmas(this.schedule, made.steps, made.spacing, made.finalSigma);
    const { x: first, sigmas, denoise } = await this.start(made, noise(), levels, await this.denoiser(made, size, maps));
    for await (const { index, now, sigma, x } of sample(denoise, first, sigmas, made.sampler, noise))
      yield { index, sigma: now.sigma, seen: shrunk(now.x, now.sigma), predicted: now.x0, latents: shrunk(x, sigma) };
  }

  /** Return denoise(x, sigma), which predicts x0 under classifier-free guidance. */
  async denoiser(made, size, maps) {
    const { scale, interval, towards } = made;
    const texts = [made.prompt, towards?.prompt ?? made.prompt, ...(scale === 1 ? [] : [made.negative])];
    const chunks = this.tokenizer ? Math.max(...texts.map((text) => cut(this.tokenizer, text).length)) : 1;
    let cond = await this.condition(made.prompt, chunks);
    if (towards) cond = between(cond, await this.condition(texts[1], chunks), towards.share);
    const both = scale === 1 ? null : joined(await this.condition(made.negative, chunks), cond);
    const { clip } = this.config;
    return async (x, sigma) => {
      const guided = both !== null && interval[0] < sigma && sigma <= interval[1];
      const [x0, conditional] = await this.predict(x, sigma, guided ? both : cond, guided ? 2 : 1, size, maps);
      if (guided) conditional.forEach((value, i) => (x0[i] = value + (scale - 1) * (value - x0[i])));
      return clip ? x0.map((value) => Math.min(Math.max(value, -clip), clip)) : x0;
    };
  }

  /** Return the x0 that the network predicts from x, once for each of `batch` conditions. */
  async predict(x, sigma, cond, batch, size, maps) {
    const { prediction } = this.config;
    const flow = prediction === "flow";
    const by = flow ? 1 / (1 + sigma) : 1 / Math.sqrt(1 + sigma * sigma);
    const t = flow ? (this.schedule.T * sigma) / (1 + sigma) : this.schedule.tAt(sigma);
    const input = new Float32Array(batch * x.length).map((_, i) => by * x[i % x.length]);
    const time = { data: new Float32Array(batch).fill(t), dims: [batch] };
    const inputs = { x: { data: input, dims: [batch, ...size] }, t: time, ...cond };
    const { output, attention } = await this.networks.unet(inputs);
    if (attention) maps.add(attention); // older files, and networks without cross-attention, have none
    const [skip, out] = SCALINGS[prediction](sigma);
    return Array.from({ length: batch }, (_, k) => x.map((value, i) => skip * value + out * output.data[k * x.length + i]));
  }

  /** Encode a prompt, padded to a number of chunks: {c_crossattn: (1, n, d), c_adm: (1, p)}. The last ones are kept. */
  async condition(prompt, chunks) {
    if (!this.tokenizer) return {};
    const key = JSON.stringify([prompt, chunks]);
    const found = this.encoded.get(key) ?? (await this.#encode(prompt, chunks));
    this.encoded.set(key, found);
    if (this.encoded.size > ENCODED) this.encoded.delete(this.encoded.keys().next().value); // the oldest
    return found;
  }

  async #encode(prompt, count) {
    const rows = cut(this.tokenizer, prompt);
    while (rows.length < count) rows.push({ tokens: [], weights: [] });
    const { contextLength } = this.tokenizer;
    const tokens = rows.flatMap((row) => this.tokenizer.frame(row.tokens));
    const ids = { data: BigInt64Array.from(tokens, BigInt), dims: [count, contextLength] };
    const { c_crossattn: states, c_adm: pooled } = await this.networks.text({ tokens: ids });
    const each = states.data.length / count;
    rows.forEach((row, i) => {
      const after = Array(contextLength - 1 - row.weights.length).fill(1);
      weigh(states.data.subarray(i * each, (i + 1) * each), [1, ...row.weights, ...after]);
    });
    const found = { c_crossattn: { data: states.data, dims: [1, count * contextLength, states.dims[2]] } };
    if (pooled) found.c_adm = { data: pooled.data.slice(0, pooled.dims[1]), dims: [1, pooled.dims[1]] };
    return found;
  }

  /** Return the words of a prompt, {text, map} of the attention to each. */
  words(prompt, maps) {
    return this.tokenizer ? maps.of(wordsOf(this.tokenizer, prompt)) : [];
  }

  /** Decode what a run has reached; under a mask, the rest is the init image's. */
  async finish(latents, made) {
    const image = await this.decode(latents, made);
    made.mask?.forEach((marked, i) => {
      if (!marked) image.data.set(made.init.data.subarray(4 * i, 4 * i + 4), 4 * i);
    });
    return image;
  }

  /** Decode latents to {data, width, height}: RGBA bytes, as an ImageData has. */
  async decode(latents, { width, height }) {
    const { channels, downsampling } = this.config;
    const dims = [1, channels, height / downsampling, width / downsampling];
    const { pixels } = await this.networks.decoder({ latents: { data: latents, dims } });
    const area = width * height;
    const data = new Uint8ClampedArray(4 * area).fill(255);
    for (let k = 0; k < 3; k++) {
      const start = this.config.image_channels === 1 ? 0 : k * area;
      for (let i = 0; i < area; i++) data[4 * i + k] = (pixels.data[start + i] + 1) * 127.5; // it rounds and clamps
    }
    return { data, width, height };
  }
}

/** Return the source of a run's noise, `count` numbers a call; between two seeds it is on the sphere between theirs. */
function noiseOf({ seed, towards }, count) {
  const first = new NormalGenerator(seed);
  if (!towards || towards.seed === seed) return () => first.normal(count);
  const last = new NormalGenerator(towards.seed);
  return () => slerp(first.normal(count), last.normal(count), towards.share);
}

function slerp(first, last, share) {
  let [product, squares, others] = [0, 0, 0];
  first.forEach((value, i) => {
    product += value * last[i];
    squares += value * value;
    others += last[i] * last[i];
  });
  const angle = Math.acos(product / Math.sqrt(squares * others));
  const [a, b] = [Math.sin((1 - share) * angle) / Math.sin(angle), Math.sin(share * angle) / Math.sin(angle)];
  return first.map((value, i) => a * value + b * last[i]);
}

/** Interpolate two conditions on straight lines. */
function between(first, last, share) {
  const mixed = ([key, { data, dims }]) => {
    const other = last[key].data;
    return [key, { data: data.map((value, i) => (1 - share) * value + share * other[i]), dims }];
  };
  return Object.fromEntries(Object.entries(first).map(mixed));
}

/** Scale x = x0 + sigma noise to the size of latents. */
function shrunk(x, sigma) {
  return x.map((value) => value / Math.sqrt(1 + sigma * sigma));
}

/** Join two conditions to a batch of two. */
function joined(first, second) {
  const both = ([key, { data, dims }]) => {
    const values = new Float32Array(2 * data.length);
    values.set(data);
    values.set(second[key].data, data.length);
    return [key, { data: values, dims: [2, ...dims.slice(1)] }];
  };
  return Object.fromEntries(Object.entries(first).map(both));
}
