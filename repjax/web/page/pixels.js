// Makes of a picture the square of pixels that the network sees in evaluation: the shorter side is
// resized, then the central square is cut out. A browser's own resizing differs: it takes few
// pixels where it makes pictures much smaller, and each browser takes others. So this file resizes
// as Pillow does, in whole numbers, bit for bit.

const BITS = 22; // of the fraction of a weight, as in Pillow

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    weight: (x) => {
      const a = -0.5, d = Math.abs(x);
      if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
      return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
    },
  },
};

// Rounds a half to the even number, as Python does.
function round(x) {
  const below = Math.floor(x);
  return x - below === 0.5 ? below + (below % 2) : Math.round(x);
}

// Returns the size of the resized picture, and the corner of the central square in it.
export function layout(width, height, { image_size: size, resize_size: resized }) {
  const shape = width <= height
    ? [resized, Math.trunc((resized * height) / width)]
    : [Math.trunc((resized * width) / height), resized];
  return { shape, left: round((shape[0] - size) / 2), top: round((shape[1] - size) / 2) };
}

// Returns for some pixels of a resized line the first pixel that each is made of, and the weights.
function weights(from, to, first, count, filter) {
  const scale = from / to, stretch = Math.max(scale, 1), support = filter.support * stretch;
  return Array.from({ length: count }, (_, place) => {
    const centre = (first + place + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5));
    const inverse = 1 / stretch, found = [];
    let sum = 0;
    for (let x = start; x < end; x++) {
      found.push(filter.weight((x - centre + 0.5) * inverse));
      sum += found[x - start];
    }
    return { start, weights: found.map((each) => fixed(sum === 0 ? each : each / sum)) };
  });
}

function fixed(weight) {
  return Math.trunc(weight * 2 ** BITS + (weight < 0 ? -0.5 : 0.5));
}

// Resizes an image along one axis, 0 for x and 1 for y, and keeps `count` pixels from `first` on.
function resized(image, axis, to, first, count, filter) {
  const size = [image.width, image.height], from = size[axis];
  size[axis] = count;
  const [width, height] = size, made = { width, height, step: 3 };
  const out = made.data = new Uint8Array(width * height * 3);
  const { data, step } = image, row = image.width * step;
  const next = axis === 0 ? step : row; // to the neighbour on the axis
  const pixels = to === from
    ? Array.from({ length: count }, (_, place) => ({ start: first + place, weights: [2 ** BITS] }))
    : weights(from, to, first, count, filter);
  let at = 0;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const { start, weights: taps } = pixels[axis === 0 ? x : y];
      const origin = (axis === 0 ? y * row : x * step) + start * next;
      for (let channel = 0; channel < 3; channel++) {
        let sum = 2 ** (BITS - 1), place = origin + channel;
        for (let tap = 0; tap < taps.length; tap++, place += next) sum += taps[tap] * data[place];
        out[at++] = Math.min(255, Math.max(0, Math.floor(sum / 2 ** BITS)));
      }
    }
  }
  return made;
}

// Returns the pixel of the picture that each pixel of a resized line takes from its middle.
function nearest(from, to, first, count) {
  const scale = from / to, found = [];
  let place = scale * 0.5;
  for (let x = 0; x < first + count; x++, place += scale) {
    if (x >= first) found.push(Math.min(from - 1, Math.floor(place)));
  }
  return found;
}

// Returns the central square of a picture as RGB bytes (S, S, 3). `data` are RGBA bytes.
export function square({ data, width, height }, how) {
  const size = how.image_size, { shape, left, top } = layout(width, height, how);
  if (how.interpolation === "nearest") {
    const out = new Uint8Array(size * size * 3);
    const xs = nearest(width, shape[0], left, size), ys = nearest(height, shape[1], top, size);
    ys.forEach((y, row) => xs.forEach((x, column) => {
      for (let channel = 0; channel < 3; channel++) {
        out[(row * size + column) * 3 + channel] = data[(y * width + x) * 4 + channel];
      }
    }));
    return out;
  }
  const filter = FILTERS[how.interpolation], corner = [left, top];
  // Each pass rounds to bytes, so that the order shows in the last bit. Pillow 13 begins with the
  // axis that shrinks more; earlier versions always began with x.
  const axes = width * shape[1] < shape[0] * height ? [1, 0] : [0, 1];
  const image = { data, width, height, step: 4 };
  return axes.reduce((made, axis) =>
    resized(made, axis, shape[axis], corner[axis], size, filter), image).data;
}

// Returns the bytes (S, S, 3) in the order (3, S, S), in which the network takes them.
export function channelsFirst(bytes) {
  const count = bytes.length / 3, out = new Uint8Array(bytes.length);
  for (let i = 0; i < count; i++) {
    for (let channel = 0; channel < 3; channel++) out[channel * count + i] = bytes[i * 3 + channel];
  }
  return out;
}
