// The picture on a canvas: kept patches as they are, dropped ones faded, merged ones tinted alike.

const GOLDEN = 0.618034; // of a turn of the colour wheel: neighbouring slots differ
const LONG_SIDE = 1024; // pixels of a canvas, about; every patch gets a whole number of them

function colourOf(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function hueColour(turn) {
  const hue = (turn % 1) * 6;
  return [0, 4, 2].map((shift) => {
    const value = Math.min(1, Math.max(0, Math.abs(((hue + shift) % 6) - 3) - 1));
    return 80 + 165 * value;
  });
}

// The image as large as a canvas: scaled once, drawn at every move of a slider.
function scaled(image, { width, height }) {
  if (!image.scaled || image.scaled.width !== width || image.scaled.height !== height) {
    image.scaled = document.createElement("canvas");
    [image.scaled.width, image.scaled.height] = [width, height];
    image.scaled.getContext("2d").drawImage(image, 0, 0, width, height);
  }
  return image.scaled;
}

class Picture {
  constructor(label, onmove) {
    this.canvas = element("canvas", { tabindex: 0, role: "slider", "aria-label": label,
      "aria-valuemin": 0, "aria-valuenow": 0, "aria-valuetext": "no patch is chosen yet" });
    this.context = this.canvas.getContext("2d");
    this.still = document.createElement("canvas"); // all but the cursor
    this.onmove = onmove;
    this.cursor = null;
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("keydown", (event) => this.step(event));
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const [rows, columns] = this.grid;
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    if (row >= 0 && row < rows && column >= 0 && column < columns) this.onmove(row * columns + column);
  }

  step(event) {
    const [rows, columns] = this.grid;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
      PageUp: -10 * columns, PageDown: 10 * columns, Home: -rows * columns, End: rows * columns };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const last = rows * columns - 1;
    let patch = (this.cursor === null ? 0 : this.cursor) + moves[event.key];
    if (event.key.startsWith("Page") || event.key.startsWith("Arrow")) {
      if (patch < 0 || patch > last) patch = this.cursor === null ? 0 : this.cursor;
    }
    this.onmove(Math.min(last, Math.max(0, patch)));
  }

  // `view` is a step's; `heat` has a number from 0 to 1 for each patch, or is null.
  show(image, grid, view, heat) {
    [this.grid, this.view] = [grid, view];
    const [rows, columns] = grid;
    this.patch = Math.max(4, Math.round(LONG_SIDE / Math.max(rows, columns)));
    this.count = rows * columns;
    this.canvas.setAttribute("aria-valuemax", this.count - 1);
    for (const canvas of [this.canvas, this.still]) {
      if (canvas.width !== columns * this.patch || canvas.height !== rows * this.patch) {
        canvas.width = columns * this.patch;
        canvas.height = rows * this.patch;
      }
    }
    const context = this.still.getContext("2d");
    context.drawImage(scaled(image, this.still), 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.mask(heat), 0, 0, this.still.width, this.still.height);
    this.outline(context);
    this.draw();
  }

  // One pixel a patch: what is laid over it.
  mask(heat) {
    const [rows, columns] = this.grid;
    const mask = document.createElement("canvas");
    [mask.width, mask.height] = [columns, rows];
    const context = mask.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    const paper = colourOf("--paper");
    const accent = colourOf("--accent");
    const slots = slotsOf(this.view, this.count);
    for (let patch = 0; patch < this.count; patch += 1) {
      let colour = paper;
      let alpha = 0;
      if (heat) {
        const value = heat[patch];
        colour = value === null ? paper : accent.map((c, i) => c * value + paper[i] * (1 - value));
        alpha = 0.82;
      } else if (!this.view.kept) {
        alpha = this.view.read ? 0.85 * (1 - Number(this.view.read[patch])) : 0;
      } else if (slots[patch] < 0) {
        alpha = 0.85;
      } else if (sizeOf(this.view, slots[patch]) > 1) {
        colour = hueColour(slots[patch] * GOLDEN);
        alpha = 0.36;
      }
      for (let i = 0; i < 3; i += 1) pixels.data[4 * patch + i] = colour[i];
      pixels.data[4 * patch + 3] = 255 * alpha;
    }
    context.putImageData(pixels, 0, 0);
    return mask;
  }

  // Lines between patches of different slots (kept ones count as one area), a dot on each slot's own.
  outline(context) {
    if (!this.view.kept || this.view.kept.length === this.count) return;
    const [rows, columns] = this.grid;
    const side = this.patch;
    const slots = slotsOf(this.view, this.count);
    const areaOf = (row, column) => {
      if (row < 0 || column < 0 || row >= rows || column >= columns) return -1;
      const slot = slots[row * columns + column];
      return slot < 0 ? -1 : sizeOf(this.view, slot) > 1 ? slot + 1 : 0;
    };
    const lines = new Path2D();
    for (let row = 0; row <= rows; row += 1) {
      for (let column = 0; column <= columns; column += 1) {
        const here = areaOf(row, column);
        if (column < columns && here !== areaOf(row - 1, column)) {
          lines.moveTo(column * side, row * side);
          lines.lineTo((column + 1) * side, row * side);
        }
        if (row < rows && here !== areaOf(row, column - 1)) {
          lines.moveTo(column * side, row * side);
          lines.lineTo(column * side, (row + 1) * side);
        }
      }
    }
    const [ink, paper] = [colourOf("--ink"), colourOf("--paper")].map((c) => `rgb(${c.join(" ")})`);
    context.strokeStyle = ink;
    context.lineWidth = Math.max(1, side / 24);
    context.stroke(lines);
    const dots = new Path2D();
    this.view.kept.forEach((index, slot) => {
      if (sizeOf(this.view, slot) < 2) return;
      const [x, y] = [(index % columns + 0.5) * side, (Math.floor(index / columns) + 0.5) * side];
      dots.moveTo(x + side / 8, y);
      dots.arc(x, y, side / 8, 0, 2 * Math.PI);
    });
    context.fillStyle = paper;
    context.fill(dots);
    context.stroke(dots);
  }

  // The cursor, and with it all patches of its slot.
  draw() {
    this.context.drawImage(this.still, 0, 0);
    if (this.cursor === null || this.cursor >= this.count) return;
    const columns = this.grid[1];
    const slots = slotsOf(this.view, this.count);
    const slot = slots[this.cursor];
    const side = this.patch;
    const frame = (patch) => this.context.strokeRect(
      patch % columns * side + 1, Math.floor(patch / columns) * side + 1, side - 2, side - 2);
    this.context.strokeStyle = `rgb(${colourOf("--accent").join(" ")})`;
    this.context.lineWidth = Math.max(2, side / 16);
    if (slot >= 0 && this.view.kept) slots.forEach((other, patch) => { if (other === slot) frame(patch); });
    this.context.lineWidth = Math.max(3, side / 8);
    frame(this.cursor);
  }

  move(patch, text) {
    this.cursor = patch;
    this.canvas.setAttribute("aria-valuenow", patch === null ? 0 : patch);
    this.canvas.setAttribute("aria-valuetext", text);
    this.draw();
  }
}
