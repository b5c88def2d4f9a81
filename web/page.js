/** The page: reads the settings, asks the worker for images, and shows them. */

import { blank, paint } from "./canvas.js";
import { Drawing } from "./drawing.js";
import { recipeText, withText } from "./recipe.js";
import { SAMPLERS } from "./samplers.js";
import { Server } from "./server.js";
import { Words } from "./words.js";

const WAIT = 150; // milliseconds after a change, before an image is asked for
const GRID_SEEDS = 4;
const FRAMES = 12; // of a loop, from the first image to the last
const PACE = 120; // milliseconds a frame
const NOISE_ALONE = 1000; // a noise level at which nothing of the image is left
const FORMS = ["compare", "grid", "change", "between"];
const GRID = { scale: [0, 1, 2, 4, 8], steps: [2, 5, 10, 20, 40], sampler: Object.keys(SAMPLERS) };

const $ = (id) => document.getElementById(id);
const runs = new Map(); // id -> {step, image, failed} of each run that is not finished
const configs = new Map(); // name -> model.json, of loaded models
const drawing = new Drawing($("drawing"), () => ({
  colour: $("colour").value,
  width: Number($("width").value),
  marks: $("tool").value === "mark",
}));
const words = new Words({ section: $("attended"), buttons: $("words"), said: $("attended-where"), canvas: $("attention") });
let [models, model, runtime, count, loaded] = [[], null, 0, 0, 0];
let worker; // makes the images: worker.js here, or the server

start().catch((error) => say(error.message));

async function start() {
  const served = new Server([]);
  const response = await served.ask("models.json");
  if (!response.ok) throw new Error(`models.json cannot be fetched: ${await reason(response)}`);
  const found = await response.json();
  ({ models, runtime } = found);
  worker = found.served ? new Server(models) : new Worker("worker.js", { type: "module" });
  worker.onmessage = receive;
  worker.onerror = (event) => say(`This browser cannot run the model: ${event.message ?? "its worker did not start"}`);
  document.body.classList.toggle("served", Boolean(found.served));
  for (const row of models) $("models").append(choice(row));
  $("licences").textContent = models.map((row) => row.licence && `${row.name} was ${row.licence}`).join(" ");
  choose(models[0]);
}

async function reason(response) {
  const said = await response.json().catch(() => ({}));
  return said.failed?.message ?? `${response.status} ${response.statusText}`;
}

function choice(row) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "model", value: row.name });
  input.checked = row === models[0];
  input.onchange = () => choose(row);
  const facts = [row.about, row.bytes && `(${megabytes(row.bytes)})`].filter(Boolean).join(" ");
  label.append(input, facts ? ` ${row.name}: ${facts}` : ` ${row.name}`);
  return label;
}

function choose(row) {
  forget();
  model = row;
  loaded = 0;
  $("prompt").value = row.examples[0];
  $("weighted").textContent = `(${row.examples[0].split(" ").at(-1) || "word"}:1.3)`;
  $("try").hidden = !row.examples.slice(1).some(Boolean);
  for (const id of ["other", "last"]) $(id).value = row.examples[1];
  $("negative").value = "";
  $("examples").replaceChildren(...row.examples.slice(1).filter(Boolean).flatMap((text, i) => (i ? [", ", example(text)] : [example(text)])));
  delete $("result").dataset.complete;
  if (configs.has(row.name)) return ready(row.name);
  document.querySelector("main").inert = true;
  say(`Loading ${row.name} …`);
  $("loading").classList.add("busy");
  worker.postMessage({ load: { name: row.name, folder: row.folder } });
}

/** Clear what the other model made, and end what it makes. */
function forget() {
  for (const id of runs.keys()) stop(id);
  loops++;
  playing = clearInterval(playing);
  $("play").disabled = true;
  for (const id of ["pair", "cells"]) $(id).replaceChildren();
  for (const id of ["changed", "loop"]) blank("No result yet", $(id));
  for (const id of ["changed-took", "loop-took", ...FORMS.map((form) => `${form}-fault`)]) $(id).textContent = "";
}

function example(text) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.className = "example";
  button.onclick = () => {
    $("prompt").value = text;
    generate();
  };
  return button;
}

/** The model has been loaded: its own settings are shown, and its first image is made. */
function ready(name) {
  if (name !== model.name) return;
  const own = configs.get(name).defaults;
  const [low, high] = own.interval ?? [0, Infinity];
  $("limits").textContent = high < 1e3 ? `This model is guided at noise levels from ${low} to ${high} alone; at others the scale is 1.` : "";
  document.querySelector("main").inert = false;
  $("loading").classList.remove("busy");
  $("scale").value = own.scale;
  $("steps").value = own.steps;
  $("sampler").value = own.sampler in SAMPLERS ? own.sampler : "ddim";
  if (!$("seed").value) $("seed").value = 0;
  drawing.clear(own.width, own.height);
  begun = false;
  say("");
  generate();
}

function receive({ data: { loaded: found, progress, step, image, failed } }) {
  if (found) {
    configs.set(found.name, found.config);
    ready(found.name);
  }
  if (progress && progress.name === model.name) {
    loaded += progress.bytes;
    $("loading").value = Math.min(1, loaded / (model.bytes + runtime));
  }
  if (step) runs.get(step.id)?.step(step);
  if (image) finished(image.id)?.image(image);
  if (failed?.name === model.name) {
    say(`${failed.message}. Choose a model to try again.`);
    $("loading").classList.remove("busy");
    document.querySelector("#models input:checked").checked = false;
  } else if (failed) finished(failed.id)?.failed(failed.message); // none of a run that was stopped
}

function finished(id) {
  const run = runs.get(id);
  runs.delete(id);
  return run;
}

/** Ask for an image: `step` is called after each step; the promise has the image. */
function ask(settings, step = () => {}) {
  const id = ++count;
  const made = new Promise((resolve, reject) => {
    runs.set(id, { step, image: resolve, failed: (message) => reject(new Error(message)) });
  });
  worker.postMessage({ run: { id, name: model.name, ...settings } });
  return { id, made };
}

function stop(id) {
  if (runs.delete(id)) worker.postMessage({ stop: id });
}

function settings() {
  if (!$("seed").checkValidity()) throw new Error(`Seed: ${$("seed").validationMessage}`);
  return {
    prompt: $("prompt").value,
    negative: $("negative").value,
    seed: Number($("seed").value),
    steps: Number($("steps").value),
    scale: Number($("scale").value),
    sampler: $("sampler").value,
  };
}

let [current, timer, frames] = [0, 0, []];
let begun = false; // whether the drawing has begun with the model's first image
let place = null; // the step that the visitor looks at; null: about a third of the way, where noise and image are seen

/** Make the image of the settings; one that is being made is given up. */
async function generate() {
  clearTimeout(timer);
  showValues();
  if (!configs.has(model.name)) return;
  delete $("result").dataset.complete;
  $("download").hidden = true;
  words.wait();
  stop(current);
  const name = model.name;
  let given;
  try {
    given = settings();
  } catch (error) {
    $("took").textContent = error.message;
    return;
  }
  const film = [];
  const { id, made } = ask({ ...given, strip: true }, (step) => {
    $("took").textContent = `step ${step.index + 1} of ${given.steps}`;
    if (!step.seen) return; // too large to be decoded at each step
    film.push(step);
    paint($("image"), step.predicted);
    if (film.length === 1) frames = film;
    showFilm(film, given.steps);
  });
  current = id;
  try {
    const image = await made;
    paint($("image"), image, `“${given.prompt}”, seed ${given.seed}`);
    $("took").textContent = `${given.steps} ${given.steps === 1 ? "step" : "steps"} in ${image.seconds.toFixed(2)} s, with the images below`;
    words.offer(image);
    if (!begun) drawing.take($("image"));
    begun = true;
    await offer(image, name);
  } catch (error) {
    $("took").textContent = error.message;
  }
}

/** Let the image be downloaded, with the recipe that `ldm txt2img --from-png` reads. */
async function offer({ made, png }, name) {
  if (!png) {
    const { source, version } = configs.get(name);
    const blob = await new Promise((resolve) => $("image").toBlob(resolve, "image/png"));
    png = withText(new Uint8Array(await blob.arrayBuffer()), recipeText({ ...made, source, version }));
  }
  URL.revokeObjectURL($("download").href);
  $("download").href = URL.createObjectURL(new Blob([png], { type: "image/png" }));
  $("download").download = `${name}-${made.seed}.png`;
  $("download").hidden = false;
  $("result").dataset.complete = "";
}

function showFilm(film, steps) {
  const slider = $("step");
  Object.assign(slider, { disabled: false, max: film.length });
  slider.value = Math.min(place ?? Math.ceil(steps / 3), film.length);
  while ($("film").childElementCount > film.length - 1) $("film").lastChild.remove();
  const canvas = paint(document.createElement("canvas"), film.at(-1).predicted);
  const own = film.length;
  canvas.onclick = () => {
    slider.value = place = own;
    showStep();
  };
  $("film").append(canvas);
  showStep();
}

function showStep() {
  const at = Math.min(Number($("step").value), frames.length);
  const { sigma, seen, predicted } = frames[at - 1];
  const level = sigma >= 10 ? Math.round(sigma) : sigma.toPrecision(2);
  $("step-shown").textContent = `${at} of ${frames.length}, noise level ${sigma < NOISE_ALONE ? level : "of noise alone"}`;
  paint($("seen"), seen, `The noisy image at step ${at}`);
  paint($("predicted"), predicted, `What the network predicted at step ${at}`);
  [...$("film").children].forEach((canvas, i) => canvas.classList.toggle("shown", i === at - 1));
}

async function compare() {
  const [given, prompts] = [settings(), [$("prompt").value, $("other").value]];
  const figures = prompts.map((prompt) => {
    const figure = document.createElement("figure");
    const caption = Object.assign(document.createElement("figcaption"), { textContent: prompt });
    figure.append(blank(prompt), caption);
    return figure;
  });
  $("pair").replaceChildren(...figures);
  await Promise.all(prompts.map((prompt, i) => into(figures[i].firstChild, { ...given, prompt })));
}

async function grid() {
  const [axis, first] = [$("axis").value, settings()];
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  head.append(heading(""), ...GRID[axis].map((value) => heading(value, "col")));
  const waiting = [];
  const begin = Math.min(first.seed, 2 ** 32 - GRID_SEEDS);
  for (let seed = begin; seed < begin + GRID_SEEDS; seed++) {
    const row = table.insertRow();
    row.append(heading(`seed ${seed}`, "row"));
    for (const value of GRID[axis]) {
      const canvas = blank(`seed ${seed}, ${axis} ${value}`);
      row.insertCell().append(canvas);
      waiting.push(into(canvas, { ...first, seed, [axis]: value }));
    }
  }
  $("cells").replaceChildren(table);
  await Promise.all(waiting);
}

/** Make the image of the drawing. */
async function change() {
  const begin = { init: drawing.image(), mask: drawing.mask(), strength: Number($("strength").value) };
  const given = { ...settings(), ...begin };
  $("changed-took").textContent = "…";
  const image = await ask(given).made.finally(() => ($("changed-took").textContent = ""));
  paint($("changed"), image, `The image, changed under “${image.made.prompt}”`);
  $("changed-took").textContent = `${image.seconds.toFixed(2)} s`;
}

let playing = null; // the timer of the loop that is shown
let loops = 0;

/** Make the images between two prompts and seeds, and show them back and forth. */
async function between() {
  const first = settings();
  const towards = { prompt: $("last").value, seed: Number($("last-seed").value) };
  const own = ++loops;
  clearInterval(playing);
  $("play").disabled = true;
  const images = [];
  for (let i = 0; i < FRAMES; i++) {
    const image = await ask({ ...first, towards: { ...towards, share: i / (FRAMES - 1) } }).made;
    if (own !== loops) return; // another loop was asked for
    images.push(image);
    paint($("loop"), image, `Between “${first.prompt}” and “${towards.prompt}”`);
    $("loop-took").textContent = `${images.length} of ${FRAMES} images`;
  }
  let at = 0;
  const next = () => paint($("loop"), images[FRAMES - 1 - Math.abs(FRAMES - 1 - (at++ % (2 * FRAMES - 2)))]);
  $("play").onclick = () => {
    playing = playing ? clearInterval(playing) : setInterval(next, PACE);
    $("play").textContent = playing ? "Pause" : "Play";
  };
  $("play").disabled = false;
  playing = null;
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) $("play").textContent = "Play";
  else $("play").click();
}

function heading(text, scope = "") {
  return Object.assign(document.createElement("th"), { textContent: text, scope });
}

/** Make an image on a canvas; one that the page no longer shows is not made. */
async function into(canvas, given) {
  const { id, made } = ask(given, () => canvas.isConnected || stop(id));
  paint(canvas, await made);
}

function showValues() {
  for (const id of ["scale", "steps", "width", "strength"]) document.querySelector(`output[for=${id}]`).textContent = $(id).value;
}

function soon() {
  showValues();
  clearTimeout(timer);
  timer = setTimeout(generate, WAIT);
}

function say(message) {
  $("status").textContent = message;
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

/** Show the images that the server has made, with their recipes. */
async function gallery() {
  const response = await worker.ask("gallery.json");
  if (!response.ok) throw new Error(await reason(response));
  const figures = Object.entries(await response.json()).map(async ([name, recipe]) => {
    const image = new Image();
    image.src = URL.createObjectURL(await (await worker.ask(`gallery/${name}`)).blob());
    image.alt = recipe.split("\n")[0];
    const caption = Object.assign(document.createElement("figcaption"), { textContent: recipe });
    const figure = document.createElement("figure");
    figure.append(image, caption);
    return figure;
  });
  $("images").replaceChildren(...(await Promise.all(figures)));
}

$("gallery-form").onsubmit = (event) => {
  event.preventDefault();
  gallery().catch((error) => say(error.message));
};
$("settings").onsubmit = (event) => {
  event.preventDefault();
  generate();
};
$("settings").oninput = soon;
$("another").onclick = () => {
  $("seed").value = Math.floor(Math.random() * 2 ** 32);
  generate();
};
$("step").oninput = () => {
  place = Number($("step").value);
  showStep();
};
for (const [id, made] of Object.entries({ compare, grid, change, between })) {
  const fault = $(`${id}-fault`);
  $(`${id}-form`).onsubmit = (event) => {
    event.preventDefault();
    fault.textContent = "";
    made().catch((error) => (fault.textContent = error.message));
  };
}
$("change-form").oninput = showValues;
$("take").onclick = () => drawing.take($("image"));
$("clear").onclick = () => drawing.clear($("drawing").width, $("drawing").height);
$("file").onchange = async () => {
  const [file] = $("file").files;
  try {
    if (file) drawing.take(await createImageBitmap(file));
  } catch {
    say(`${file.name} is not an image that this browser reads`);
  }
};
