/**
 * The model in a thread of its own, so that the page stays usable.
 *
 * Messages in: {load: {name, folder}}, {run: {id, name, ...settings}}, {stop: id}. A run with an id that is stopped ends
 * before its next step. Messages out: {loaded}, {progress}, {step}, {image}, {failed}.
 */

import * as ort from "./onnxruntime/ort.wasm.bundle.min.mjs";
import { AttentionMaps } from "./attention.js";
import { Model } from "./model.js";

const models = new Map(); // name -> Promise of a Model
const runs = new Map(); // id -> whether it is to end, of each run that is not finished
let runtime = null; // Promise of onnxruntime's code
let turn = Promise.resolve(); // runs wait for each other

self.onmessage = ({ data }) => {
  if (runs.has(data.stop)) runs.set(data.stop, true);
  if (data.load) models.get(data.load.name) ?? models.set(data.load.name, load(data.load));
  if (data.run) wait(data.run);
};

/** Let a run wait for its turn. */
function wait(asked) {
  runs.set(asked.id, false);
  const failed = (error) => self.postMessage({ failed: { id: asked.id, message: error.message } });
  turn = turn.then(() => run(asked)).catch(failed).finally(() => runs.delete(asked.id));
}

async function load({ name, folder }) {
  try {
    ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
    runtime ??= fetched("onnxruntime/ort-wasm-simd-threaded.wasm.gz", name);
    ort.env.wasm.wasmBinary = await runtime.catch((error) => {
      runtime = null; // it may be tried again
      throw error;
    });
    const path = (file) => `${encodeURIComponent(folder)}/${file}`;
    const text = new TextDecoder().decode(await fetched(path("model.json"), name));
    const config = JSON.parse(text.replace(/\bInfinity\b/gu, "1e999")); // as Python writes it
    const files = ["unet", "decoder", ...(config.tokenizer ? ["text"] : [])];
    const networks = {};
    for (const file of files) networks[file] = await network(await fetched(path(`${file}.onnx.gz`), name));
    let encoder; // fetched only for an image to begin with
    networks.encoder = async (inputs) =>
      (encoder ??= await network(await fetched(path("encoder.onnx.gz"), name)))(inputs);
    self.postMessage({ loaded: { name, config } });
    return new Model(config, networks);
  } catch (error) {
    models.delete(name); // it may be tried again
    self.postMessage({ failed: { id: null, name, message: error.message } });
    throw error;
  }
}

/** Fetch a file, and decompress it if the server has not; report how many bytes have come. */
async function fetched(path, name) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path} cannot be fetched: ${response.status} ${response.statusText}`);
  const parts = [];
  for (const reader = response.body.getReader(); ; ) {
    const { value, done } = await reader.read();
    if (done) break;
    parts.push(value);
    self.postMessage({ progress: { name, bytes: value.byteLength } });
  }
  const [first, second] = parts[0] ?? [];
  if (first !== 0x1f || second !== 0x8b) return whole(new Blob(parts).stream());
  return whole(new Blob(parts).stream().pipeThrough(new DecompressionStream("gzip")));
}

async function whole(stream) {
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function network(bytes) {
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  return async (inputs) => {
    const tensor = ({ data, dims }) => new ort.Tensor(data instanceof BigInt64Array ? "int64" : "float32", data, dims);
    return session.run(Object.fromEntries(Object.entries(inputs).map(([name, array]) => [name, tensor(array)])));
  };
}

async function run({ id, name, ...given }) {
  const model = await models.get(name);
  const made = model.settings(given);
  if (await asked(id)) return;
  const began = performance.now();
  const maps = new AttentionMaps();
  let step;
  for await (step of model.generate(given, maps)) {
    if (await asked(id)) return;
    if (given.strip) self.postMessage({ step: await frame(model, made, id, step) });
    else self.postMessage({ step: { id, index: step.index, sigma: step.sigma } });
  }
  const image = await model.finish(step.latents, made);
  const words = given.strip ? model.words(made.prompt, maps) : [];
  const seconds = (performance.now() - began) / 1000;
  self.postMessage({ image: { id, ...image, words, made: { ...made, init: undefined, mask: undefined }, seconds } });
}

/** Return the two images of a step: what the network saw, and what it predicted. */
async function frame(model, made, id, { index, sigma, seen, predicted }) {
  return { id, index, sigma, seen: await model.decode(seen, made), predicted: await model.decode(predicted, made) };
}

/** Let messages in; return whether this run is to end. */
function asked(id) {
  return new Promise((resolve) => setTimeout(() => resolve(runs.get(id)), 0));
}
