// Takes a picture, runs every form of the network on it, and shows the results and the times.
// `?picture=NAME` opens a picture of the server.

import * as ort from "./ort.wasm.min.mjs";
import { channelsFirst, square } from "./pixels.js";

const TURNS = 9; // measurements of a form, of which the median is shown
const TURN = 20; // milliseconds of a measurement at least: clocks of browsers are coarse
const SHOWN = 5; // labels

const at = (id) => document.getElementById(id);
const pad = at("pad"), pen = pad.getContext("2d", { willReadFrequently: true });
const forms = []; // with the session of each
let settings, ink, paper, picture = null, running = false, waiting = false;

function say(text, bad = false) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", bad);
}

async function start() {
  ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;
  settings = await (await fetched("page.json")).json();
  document.title = at("title").textContent = settings.title;
  if (settings.note) at("note").textContent = settings.note;
  // A drawing lies nearest to the pictures of training where its paper is as dark as they are.
  const { mean } = settings.preprocessing;
  [ink, paper] = mean[0] + mean[1] + mean[2] < 1.5 ? ["#fff", "#000"] : ["#000", "#fff"];
  wipe();
  for (const form of settings.forms) {
    const file = await (await fetched(form.file)).arrayBuffer();
    forms.push({ ...form, session: await ort.InferenceSession.create(file) });
    const row = at("times").tBodies[0].insertRow();
    [form.name, "–", bytes(form.size)].forEach((text) => { row.insertCell().textContent = text; });
  }
  say("Ready.");
  listen();
  const name = new URLSearchParams(location.search).get("picture");
  if (name) await open(await (await fetched(name)).blob());
}

async function fetched(name) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`the server has no ${name} (${answer.status})`);
  return answer;
}

function bytes(count) {
  return count < 1e6 ? `${Math.round(count / 1e3)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

// Opens a picture as it is: turned as its file says, without a change of its colours. Transparent
// pixels lie on white.
async function open(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, {
      imageOrientation: "from-image", colorSpaceConversion: "none",
    });
  } catch {
    say("This file is no picture that the browser can read.", true);
    return;
  }
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  picture = context.getImageData(0, 0, canvas.width, canvas.height);
  wipe();
  const scale = Math.min(pad.width / bitmap.width, pad.height / bitmap.height);
  const [width, height] = [bitmap.width * scale, bitmap.height * scale];
  pen.drawImage(bitmap, (pad.width - width) / 2, (pad.height - height) / 2, width, height);
  await look();
}

function wipe() {
  pen.fillStyle = paper;
  pen.fillRect(0, 0, pad.width, pad.height);
}

// Looks at the picture, or at the drawing. While it looks, the next look waits.
async function look() {
  waiting = true;
  if (running) return;
  running = true;
  say("Running…");
  try {
    while (waiting) {
      waiting = false;
      const seen = square(picture ?? pen.getImageData(0, 0, pad.width, pad.height),
        settings.preprocessing);
      await show(seen);
    }
    say("Ready.");
  } catch (error) {
    say(`The network could not be run: ${error.message}`, true);
  } finally {
    running = false;
  }
}

async function show(seen) {
  const size = settings.preprocessing.image_size;
  const images = new ort.Tensor("uint8", channelsFirst(seen), [1, 3, size, size]);
  const outputs = [];
  for (const form of forms) outputs.push(await form.session.run({ images }));
  const results = outputs.map((each) => Object.values(each)[0]);
  if (settings.task === "segmentation") overlay(seen, results[0]);
  else labels(seen, results[0]);
  await time(images);
  agree(results);
}

// Shows for each form the median time of one picture. The forms take turns, so that a machine that
// is busy for a moment slows all of them.
async function time(images) {
  const times = forms.map(() => []);
  for (let turn = 0; turn < TURNS; turn++) {
    for (const [place, form] of forms.entries()) {
      const begin = performance.now();
      let runs = 0, taken = 0;
      while (taken < TURN) {
        await form.session.run({ images });
        runs++;
        taken = performance.now() - begin;
      }
      times[place].push(taken / runs);
    }
    if (waiting) return; // a newer picture
  }
  forms.forEach((form, place) => {
    form.time = times[place].sort((a, b) => a - b)[TURNS >> 1];
    at("times").tBodies[0].rows[place].cells[1].textContent = `${form.time.toPrecision(3)} ms`;
  });
}

function agree(results) {
  if (forms.length < 2 || !forms[1].time) return;
  const share = forms[0].time / forms[1].time;
  const [first, other] = results.map((each) => each.data);
  let largest = 0, difference = 0;
  first.forEach((value, place) => {
    largest = Math.max(largest, Math.abs(other[place]));
    difference = Math.max(difference, Math.abs(value - other[place]));
  });
  at("comparison").textContent =
    `The ${forms[0].name} takes ${(100 * share).toFixed(0)} % of the time of the ` +
    `${forms[1].name}. Their results differ by ${(difference / (largest || 1)).toExponential(0)} ` +
    `of the largest ${settings.output === "logits" ? "logit" : "probability"}.`;
}

function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(logits, (each) => Math.exp(each - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((each) => each / sum);
}

const nameOf = (place) => settings.class_names[place] ?? `class ${place}`;

function labels(seen, { data }) {
  draw(seen);
  const rows = settings.output === "logits" ? softmax(data) : Array.from(data);
  const best = rows.map((share, place) => ({ share, name: nameOf(place) }))
    .sort((a, b) => b.share - a.share).slice(0, SHOWN);
  list(best);
}

// Shows a bar for each row. Names come from files, and are put in as text.
function list(rows) {
  at("results").replaceChildren(...rows.map(({ share, name, color }) => {
    const row = element("div", "label"), bar = element("div", "bar"), part = element("div");
    part.style.width = `${100 * share}%`;
    if (color) part.style.background = `rgb(${color})`;
    bar.append(part);
    row.append(element("span", "", name), bar, element("span", "", `${(100 * share).toFixed(1)}\u00a0%`));
    return row;
  }));
}

function element(tag, kind = "", text = "") {
  const made = document.createElement(tag);
  made.className = kind;
  made.textContent = text;
  return made;
}

// Returns the colour of a class, or one that is far from its neighbours' if the classes have none.
function color(place) {
  const known = settings.class_colors?.[place];
  if (known) return known;
  const hue = (place * 137.508) % 360;
  const channel = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (0.55 - 0.4 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}

// Lays the class of each pixel over the picture. Logits are (1, K, H, W).
function overlay(seen, { data, dims: [, classes, height, width] }) {
  const area = height * width;
  const counts = new Array(classes).fill(0), mixed = new Uint8Array(seen);
  const colors = counts.map((_, place) => color(place));
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const place = y * width + x;
      let best = 0;
      for (let k = 1; k < classes; k++) {
        if (data[k * area + place] > data[best * area + place]) best = k;
      }
      counts[best]++;
      for (let c = 0; c < 3; c++) {
        mixed[place * 3 + c] = 0.45 * seen[place * 3 + c] + 0.55 * colors[best][c];
      }
    }
  }
  draw(mixed);
  at("seen").classList.add("wide");
  at("caption").textContent = "The class of each pixel, over what the network sees";
  list(counts.map((count, place) => ({
    share: count / area, name: nameOf(place), color: colors[place],
  })).filter(({ share }) => share > 0).sort((a, b) => b.share - a.share));
}

function draw(seen) {
  const size = settings.preprocessing.image_size, canvas = at("seen");
  canvas.width = canvas.height = size;
  const image = new ImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    for (let c = 0; c < 3; c++) image.data[i * 4 + c] = seen[i * 3 + c];
    image.data[i * 4 + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.parentElement.hidden = false;
}

function clear() {
  picture = null;
  wipe();
  at("results").replaceChildren();
  at("seen").parentElement.hidden = true;
}

function listen() {
  const place = (event) => {
    const box = pad.getBoundingClientRect();
    return [(event.clientX - box.left) * pad.width / box.width,
      (event.clientY - box.top) * pad.height / box.height];
  };
  let last = null;
  pad.addEventListener("pointerdown", (event) => {
    if (picture) clear();
    pad.setPointerCapture(event.pointerId);
    last = place(event);
    stroke(last, last);
  });
  pad.addEventListener("pointermove", (event) => {
    if (!last) return;
    const next = place(event);
    stroke(last, next);
    last = next;
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    pad.addEventListener(kind, () => {
      if (last) look();
      last = null;
    });
  }
  at("clear").addEventListener("click", clear);
  at("paper").addEventListener("click", () => {
    [ink, paper] = [paper, ink];
    clear();
  });
  at("file").addEventListener("change", (event) => {
    if (event.target.files[0]) open(event.target.files[0]);
    event.target.value = ""; // so that the same file can be opened again
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      at("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files[0]) open(event.clipboardData.files[0]);
  });
}

function stroke(from, to) {
  pen.strokeStyle = ink;
  pen.lineWidth = pad.width / 9;
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(...to);
  pen.stroke();
}

start().catch((error) => say(`The page could not be started: ${error.message}`, true));
