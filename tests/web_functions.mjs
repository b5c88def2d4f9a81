/** What tests/test_web.py asks of the page's modules: a list of tasks as JSON comes in, the list of results goes out. */

import { readFileSync } from "node:fs";
import { AttentionMaps, overlay, wordsOf } from "../web/attention.js";
import { Model } from "../web/model.js";
import { NormalGenerator } from "../web/noise.js";
import { cut, parsePrompt } from "../web/prompt.js";
import { recipeText, withText } from "../web/recipe.js";
import { Schedule, samplingSigmas } from "../web/schedule.js";
import { Tokenizer } from "../web/tokenizer.js";

/** Networks that test_web.py has too. */
const networks = (channels, factor) => ({
  async text({ tokens: { data, dims } }) {
    const states = [...data].flatMap((id, i) => [0, 1].map((k) => Math.sin(Number(id) * 0.37 * (k + 1) + (i % dims[1]))));
    const pooled = Float32Array.from({ length: dims[0] }, (_, b) => Math.cos(Number(data[b * dims[1] + 1])));
    return {
      c_crossattn: { data: Float32Array.from(states), dims: [...dims, 2] },
      c_adm: { data: pooled, dims: [dims[0], 1] },
    };
  },
  async unet({ x, t, c_crossattn: states, c_adm: pooled }) {
    const each = x.data.length / x.dims[0];
    const width = states.data.length / x.dims[0];
    const data = x.data.map((value, i) => {
      const b = Math.floor(i / each);
      const mean = states.data.subarray(b * width, (b + 1) * width).reduce((sum, s) => sum + s, 0) / width;
      return Math.tanh(value + t.data[b] / 1000 + mean * (((i % each) % 3) - 1) + pooled.data[b] / 2);
    });
    const tokens = states.dims[1];
    const seen = Float32Array.from({ length: x.dims[0] * tokens * 6 }, (_, i) => {
      const [b, n] = [Math.floor(i / 6 / tokens), Math.floor(i / 6) % tokens]; // a map of 2 x 3 for each token
      return Math.tanh(states.data[2 * (b * tokens + n)] + x.data[b * each + (i % 6)]);
    });
    return { output: { data, dims: x.dims }, attention: { data: seen, dims: [x.dims[0], tokens, 2, 3] } };
  },
  async encoder({ pixels: { data, dims } }) {
    const [height, width] = [dims[2] / factor, dims[3] / factor];
    const latents = Float32Array.from({ length: 4 * height * width }, (_, i) => {
      const [k, y, x] = [Math.floor(i / (height * width)), Math.floor(i / width) % height, i % width];
      return data[(((k % channels) * dims[2] + y * factor) * dims[3]) + x * factor] * (k + 1);
    });
    return { latents: { data: latents, dims: [1, 4, height, width] } };
  },
  async decoder({ latents: { data, dims } }) {
    const [height, width] = [dims[2] * factor, dims[3] * factor];
    const pixels = Float32Array.from({ length: channels * height * width }, (_, i) => {
      const [k, y, x] = [Math.floor(i / (height * width)), Math.floor(i / width) % height, i % width];
      return Math.tanh(data[(k * dims[2] + Math.floor(y / factor)) * dims[3] + Math.floor(x / factor)]);
    });
    return { pixels: { data: pixels, dims: [1, channels, height, width] } };
  },
});

const tasks = {
  noise({ seed, counts }) {
    const generator = new NormalGenerator(BigInt(seed));
    return counts.map((count) => [...generator.normal(count)]);
  },
  tokens: ({ settings, texts }) => texts.map((text) => new Tokenizer(settings).encode(text)),
  pieces: ({ prompt }) => parsePrompt(prompt).map((section) => section.map(({ text, weight }) => [text, weight])),
  chunks: ({ settings, prompt }) => cut(new Tokenizer(settings), prompt).map(({ tokens, weights }) => [tokens, weights]),
  sigmas: ({ shares, steps, spacing, last }) => samplingSigmas(new Schedule(shares), steps, spacing, last),
  timesteps: ({ shares, sigmas }) => sigmas.map((sigma) => new Schedule(shares).tAt(sigma)),
  async encoded({ config, prompts }) {
    const model = new Model(config, networks(config.image_channels, config.downsampling));
    for (const prompt of prompts) await model.condition(prompt, 1);
    return [...model.encoded.keys()].map((key) => JSON.parse(key)[0]);
  },
  async image({ config, given, old }) {
    const model = new Model(config, networks(config.image_channels, config.downsampling));
    const { unet } = model.networks;
    if (old) model.networks.unet = async (inputs) => ({ output: (await unet(inputs)).output });
    if (given.init) given = { ...given, init: { ...given.init, data: Uint8ClampedArray.from(given.init.data) } };
    const levels = [];
    const maps = new AttentionMaps();
    let last;
    for await (last of model.generate(given, maps)) levels.push(last.sigma);
    const words = model.words(given.prompt ?? "", maps).map(({ text, map: { data } }) => [text, [...data]]);
    return { levels, words, rgba: [...(await model.finish(last.latents, model.settings(given))).data] };
  },
  words: ({ settings, prompt }) => wordsOf(new Tokenizer(settings), prompt).map(({ text, places }) => [text, places]),
  overlay: ({ image, map }) => [...overlay({ ...image, data: Uint8ClampedArray.from(image.data) }, map).data],
  png: ({ bytes, text }) => [...withText(Uint8Array.from(bytes), text)],
  recipe: ({ config, given, source }) =>
    recipeText({ ...new Model(config, {}).settings(given), source, version: "ldm test" }),
};

const results = [];
for (const { name, ...given } of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    results.push(await tasks[name](given));
  } catch (error) {
    results.push({ error: error.message });
  }
}
process.stdout.write(JSON.stringify(results));
