/**
 * A model that onnxruntime computes: prompts to latents to pixels, by the same steps as `ldm.generate`.
 *
 * It is a folder that `ldm convert MODEL FOLDER --format onnx` writes (`ldm/onnx/model.py`): `model.json`, and the networks
 * text, unet and decoder. This file knows nothing of a page or of files: networks are functions from arrays to arrays.
 */

import { NormalGenerator } from "./noise.js";
import { cut, weigh } from "./prompt.js";
import { SAMPLERS, sample } from "./samplers.js";
import { Schedule, samplingSigmas } from "./schedule.js";
import { Tokenizer } from "./tokenizer.js";

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
    };
  }

  /** Yield {index, sigma, seen, predicted, latents} after each step of one image: what the network saw at noise level
   * sigma, what it predicted, and what the step reached, as latents for `decode`. */
  async *generate(given) {
    const made = this.settings(given);
    const size = [this.config.channels, made.height / this.config.downsampling, made.width / this.config.downsampling];
    const count = size.reduce((a, b) => a * b);
    const generator = new NormalGenerator(made.seed);
    const noise = () => generator.normal(count);
    const sigmas = samplingSigmas(this.schedule, made.steps, made.spacing, made.finalSigma);
    const level = Math.sqrt(1 + sigmas[0] ** 2);
    const denoise = await this.denoiser(made, size);
    const start = noise().map((value) => value * level);
    for await (const { index, now, sigma, x } of sample(denoise, start, sigmas, made.sampler, noise))
      yield { index, sigma: now.sigma, seen: shrunk(now.x, now.sigma), predicted: now.x0, latents: shrunk(x, sigma) };
  }

  /** Return denoise(x, sigma), which predicts x0 under classifier-free guidance. */
  async denoiser(made, size) {
    const { scale, interval } = made;
    const chunks = this.tokenizer ? Math.max(...[made.prompt, made.negative].map((text) => this.chunks(text).length)) : 1;
    const cond = await this.condition(made.prompt, chunks);
    const both = scale === 1 ? null : joined(await this.condition(made.negative, chunks), cond);
    const { clip } = this.config;
    return async (x, sigma) => {
      const guided = both !== null && interval[0] < sigma && sigma <= interval[1];
      const [x0, conditional] = await this.predict(x, sigma, guided ? both : cond, guided ? 2 : 1, size);
      if (guided) conditional.forEach((value, i) => (x0[i] = value + (scale - 1) * (value - x0[i])));
      return clip ? x0.map((value) => Math.min(Math.max(value, -clip), clip)) : x0;
    };
  }

  /** Return the x0 that the network predicts from x, once for each of `batch` conditions. */
  async predict(x, sigma, cond, batch, size) {
    const { prediction } = this.config;
    const flow = prediction === "flow";
    const by = flow ? 1 / (1 + sigma) : 1 / Math.sqrt(1 + sigma * sigma);
    const t = flow ? (this.schedule.T * sigma) / (1 + sigma) : this.schedule.tAt(sigma);
    const input = new Float32Array(batch * x.length).map((_, i) => by * x[i % x.length]);
    const time = { data: new Float32Array(batch).fill(t), dims: [batch] };
    const { output } = await this.networks.unet({ x: { data: input, dims: [batch, ...size] }, t: time, ...cond });
    const [skip, out] = SCALINGS[prediction](sigma);
    return Array.from({ length: batch }, (_, k) => x.map((value, i) => skip * value + out * output.data[k * x.length + i]));
  }

  chunks(prompt) {
    return cut(this.tokenizer, prompt);
  }

  /** Encode a prompt, padded to a number of chunks: {c_crossattn: (1, n, d), c_adm: (1, p)}. Each is computed once. */
  async condition(prompt, chunks) {
    if (!this.tokenizer) return {};
    const key = JSON.stringify([prompt, chunks]);
    if (!this.encoded.has(key)) this.encoded.set(key, await this.#encode(prompt, chunks));
    return this.encoded.get(key);
  }

  async #encode(prompt, count) {
    const rows = this.chunks(prompt);
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
