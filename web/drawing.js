/** A canvas to draw on, and to mark what is made anew. It is as large as the model's images. */

const MARK = "rgb(255 0 128 / 45%)"; // over what is marked

export class Drawing {
  /**
   * @param {HTMLCanvasElement} canvas shows the image and the marks
   * @param {() => {colour: string, width: number, marks: boolean}} brush says what the brush does now
   */
  constructor(canvas, brush) {
    Object.assign(this, { canvas, brush });
    this.layers = [new OffscreenCanvas(1, 1), new OffscreenCanvas(1, 1)]; // the image, the marks
    this.at = null;
    canvas.onpointerdown = (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.at = this.#place(event);
      this.#stroke(this.at, this.at);
    };
    canvas.onpointermove = (event) => {
      if (!event.buttons) return;
      const to = this.#place(event);
      this.#stroke(this.at ?? to, to);
      this.at = to;
    };
    canvas.onkeydown = (event) => this.#key(event);
    canvas.onblur = () => this.#show();
  }

  /** Begin with an empty image of that size. */
  clear(width, height) {
    for (const layer of [this.canvas, ...this.layers]) Object.assign(layer, { width, height });
    const context = this.layers[0].getContext("2d");
    context.fillStyle = "black";
    context.fillRect(0, 0, width, height);
    this.cursor = [width / 2, height / 2];
    this.#show();
  }

  /** Begin with another canvas or bitmap, its middle cut out to this size. */
  take(source) {
    const { width, height } = this.canvas;
    this.clear(width, height);
    const scale = Math.max(width / source.width, height / source.height);
    const [w, h] = [source.width * scale, source.height * scale];
    this.layers[0].getContext("2d").drawImage(source, (width - w) / 2, (height - h) / 2, w, h);
    this.#show();
  }

  /** Return the image as {data, width, height}: RGBA bytes. */
  image() {
    const { data, width, height } = this.#pixels(0);
    return { data, width, height };
  }

  /** Return for each pixel whether it is marked; null where none is. */
  mask() {
    const { data, width, height } = this.#pixels(1);
    const found = Uint8Array.from({ length: width * height }, (_, i) => (data[4 * i + 3] >= 128 ? 1 : 0));
    return found.some(Boolean) ? found : null;
  }

  #pixels(layer) {
    const { width, height } = this.canvas;
    return this.layers[layer].getContext("2d").getImageData(0, 0, width, height);
  }

  /** Return where an event is, in pixels of the image. */
  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    const share = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return [share[0] * this.canvas.width, share[1] * this.canvas.height];
  }

  #stroke(from, to) {
    const { colour, width, marks } = this.brush();
    const context = this.layers[marks ? 1 : 0].getContext("2d");
    Object.assign(context, { strokeStyle: colour, lineWidth: width, lineCap: "round" });
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(to[0] + 0.01, to[1]); // a line of no length would show nothing
    context.stroke();
    this.#show();
  }

  /** Move the cursor by arrow keys; paint there with the space bar. */
  #key(event) {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!by && event.key !== " ") return;
    event.preventDefault();
    const { width, height } = this.canvas;
    if (by) {
      const [x, y] = [this.cursor[0] + by[0], this.cursor[1] + by[1]];
      this.cursor = [Math.min(Math.max(x, 0), width), Math.min(Math.max(y, 0), height)];
      this.#show(this.cursor);
    } else this.#stroke(this.cursor, this.cursor);
  }

  #show(cursor = null) {
    const { width, height } = this.canvas;
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    context.drawImage(this.layers[0], 0, 0);
    const marks = new OffscreenCanvas(width, height);
    const own = marks.getContext("2d");
    own.drawImage(this.layers[1], 0, 0);
    Object.assign(own, { globalCompositeOperation: "source-in", fillStyle: MARK });
    own.fillRect(0, 0, width, height);
    context.drawImage(marks, 0, 0);
    if (cursor) {
      context.strokeStyle = "orange";
      context.strokeRect(cursor[0] - 1.5, cursor[1] - 1.5, 3, 3);
    }
  }
}
