/** What worker.js does, by `ldm serve`: the same messages, answered by the server that sent this page. */

const SILENT = "the server does not answer any more: was it stopped?";

export class Server {
  /** @param {object[]} rows of models.json */
  constructor(rows) {
    this.rows = new Map(rows.map((row) => [row.name, row]));
    this.token = new URLSearchParams(location.hash.slice(1)).get("token");
    this.onmessage = () => {};
  }

  postMessage({ load, run, stop }) {
    if (load) this.onmessage({ data: { loaded: { name: load.name, config: this.rows.get(load.name).config } } });
    if (run) this.#run(run).catch((error) => this.onmessage({ data: { failed: { id: run.id, message: error.message } } }));
    if (stop !== undefined) this.ask("stop", { id: this.#known(stop) });
  }

  /** Send a request with the token. */
  ask(path, body) {
    const headers = { "content-type": "application/json", ...(this.token && { authorization: `Bearer ${this.token}` }) };
    const asked = fetch(path, body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) });
    return asked.catch(() => Promise.reject(new Error(SILENT)));
  }

  #visit = crypto.getRandomValues(new Uint32Array(2)).join("-");

  /** An id that no other visitor has. */
  #known(id) {
    return `${this.#visit}-${id}`;
  }

  async #run({ id, init, mask, ...given }) {
    const asked = { ...given, id: this.#known(id), init: init && { ...init, data: base64(init.data) } };
    const response = await this.ask("run", { ...asked, mask: mask && base64(mask) });
    if (!response.ok) throw new Error((await response.json()).failed.message);
    const lines = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let [rest, last] = ["", false]; // last: the image, or what failed, has come
    for (;;) {
      const { value, done } = await lines.read().catch(() => Promise.reject(new Error(SILENT)));
      const parts = (rest + (value ?? (done && rest ? "\n" : ""))).split("\n");
      rest = parts.pop();
      for (const part of parts.filter(Boolean)) last = await this.#event(id, JSON.parse(part), given);
      if (done && !last) throw new Error("the server ended the run");
      if (done) return;
    }
  }

  /** Pass an event on; return whether it is a run's last. */
  async #event(id, { step, image, failed }, made) {
    if (failed) this.onmessage({ data: { failed: { ...failed, id } } });
    if (failed) return true;
    if (step?.seen) step = { ...step, seen: await pixels(step.seen), predicted: await pixels(step.predicted) };
    if (step) this.onmessage({ data: { step: { ...step, id } } });
    if (!image) return false;
    const { words, seconds } = image;
    this.onmessage({ data: { image: { id, ...(await pixels(image.png)), png: bytes(image.png), made, words, seconds } } });
    return true;
  }
}

function base64(data) {
  let text = "";
  for (const byte of data) text += String.fromCharCode(byte);
  return btoa(text);
}

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** Decode a PNG in base64 to {data, width, height}. */
async function pixels(png) {
  const bitmap = await createImageBitmap(new Blob([bytes(png)], { type: "image/png" }));
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data, width, height } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  return { data, width, height };
}
