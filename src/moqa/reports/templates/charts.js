"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
const tip = document.getElementById("tip");
const drawn = new Map();

function add(parent, name, attributes, text) {
  const node = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name));
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// A table is stored as shares of its range in 16 bits; the last code is a cell without a value.
function unpacked({ data, low, high }) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return Array.from(new Uint16Array(bytes.buffer), (code) => (code === 65535 ? NaN : low + ((high - low) * code) / 65534));
}

function written(value, format = "") {
  const digits = format.match(/\.(\d)f/);
  const size = digits ? Math.abs(value).toFixed(digits[1]) : Math.round(Math.abs(value)).toLocaleString("en");
  return (value < 0 ? "\u2212" : format.startsWith("+") ? "+" : "") + size;
}

// Every label of a heat map's axis, or every second, fifth, tenth, ..., as many as there is room for.
function spaced(names, room) {
  const step = [1, 2, 5, 10, 20, 50, 100, 200].find((n) => n * room >= names.length) ?? names.length;
  return names.map((name, index) => [(index + 0.5) / names.length, name]).filter((_, index) => index % step === 0);
}

// Labels and titles of both axes, which leave the box in which the chart is drawn. Labels are [share of the axis, text].
function frame(plot, x, y) {
  plot.replaceChildren();
  const [width, height] = [plot.clientWidth, plot.clientHeight];
  const widest = (labels) => Math.max(0, ...labels.map(([, text]) => String(text).length)) * 7;
  const box = { left: widest(y.labels) + (y.title ? 26 : 10), top: 10, right: width - 14 };
  const turned = x.turn && widest(x.labels) > (box.right - box.left) / x.labels.length;
  box.bottom = height - (turned ? widest(x.labels) + 4 : 20) - (x.title ? 20 : 2);
  const svg = add(plot, "svg", { width, height });
  const across = (share) => box.left + share * (box.right - box.left);
  const down = (share) => box.top + share * (box.bottom - box.top);
  let end = -Infinity;
  for (const [share, text] of x.labels) {
    const half = String(text).length * 3.5;
    if (turned) {
      add(svg, "text", { transform: `translate(${across(share) + 4} ${box.bottom + 6}) rotate(-90)`, "text-anchor": "end" }, text);
    } else if (across(share) - half > end + 4) {
      add(svg, "text", { x: across(share), y: box.bottom + 16, "text-anchor": "middle" }, text);
      end = across(share) + half;
    }
  }
  end = -Infinity;
  for (const [share, text] of [...y.labels].sort((a, b) => a[0] - b[0])) {
    if (down(share) < end + 14) continue;
    add(svg, "text", { x: box.left - 6, y: down(share) + 4, "text-anchor": "end" }, text);
    end = down(share);
  }
  add(svg, "text", { x: across(0.5), y: height - 5, "text-anchor": "middle" }, x.title);
  add(svg, "text", { transform: `translate(11 ${down(0.5)}) rotate(-90)`, "text-anchor": "middle" }, y.title);
  return { svg, across, down, ...box };
}

function heat(plot, figure) {
  const { rows, columns, hover, limits: [low, high] } = figure;
  const turn = typeof columns[0] === "string";
  const [x, y] = figure.titles;
  const across = spaced(columns, turn ? Infinity : plot.clientWidth / 32);
  const box = frame(plot, { title: x, labels: across, turn }, { title: y, labels: spaced(rows, plot.clientHeight / 16) });
  const values = unpacked(figure.z), more = figure.more.map(unpacked);
  const colours = COLOURS[figure.scale][dark.matches ? 1 : 0].map((c) => [1, 3, 5].map((at) => parseInt(c.slice(at, at + 2), 16)));
  const canvas = Object.assign(document.createElement("canvas"), { width: columns.length, height: rows.length });
  const context = canvas.getContext("2d"), pixels = context.createImageData(columns.length, rows.length);
  values.forEach((value, cell) => {
    if (Number.isNaN(value)) return;
    const at = Math.min(Math.max((value - low) / (high - low), 0), 1) * (colours.length - 1);
    const [from, to] = [colours[Math.floor(at)], colours[Math.ceil(at)]];
    pixels.data.set([...from.map((part, i) => part + (to[i] - part) * (at % 1)), 255], 4 * cell);
  });
  context.putImageData(pixels, 0, 0);
  const [width, height] = [box.right - box.left, box.bottom - box.top];
  Object.assign(canvas.style, { left: `${box.left}px`, top: `${box.top}px`, width: `${width}px`, height: `${height}px` });
  plot.prepend(canvas);
  if (Math.max(rows.length, columns.length) <= 32) {
    const gaps = [...columns.keys()].slice(1).map((n) => `M${box.across(n / columns.length)} ${box.top}v${height}`);
    gaps.push(...[...rows.keys()].slice(1).map((n) => `M${box.left} ${box.down(n / rows.length)}h${width}`));
    add(box.svg, "path", { d: gaps.join(""), class: "gap" });
  }
  return (left, top) => {
    const column = Math.floor(((left - box.left) / width) * columns.length);
    const row = Math.floor(((top - box.top) / height) * rows.length);
    const cell = row * columns.length + column;
    if (column < 0 || column >= columns.length || row < 0 || row >= rows.length || Number.isNaN(values[cell])) return null;
    const named = { x: columns[column], y: rows[row] };
    return hover.replace(/\{(\w)(?::([^}]*))?\}/g, (_, key, format) =>
      named[key] ?? written(key === "z" ? values[cell] : more[key][cell], format));
  };
}

const MARKERS = {
  circle: "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z", square: "M-4 -4h8v8h-8z",
  diamond: "M0 -5.5L5.5 0L0 5.5L-5.5 0z", "triangle-up": "M0 -5.5L5.2 4.5H-5.2z",
};
const DASHES = { solid: "none", dash: "7 5", dot: "2 4", dashdot: "7 4 2 4" };

function lines(plot, { lines, axes }) {
  const [x, y] = axes.map(({ limits: [low, high], log, ...axis }) => {
    const scaled = log ? Math.log10 : Number;
    const share = (value) => (scaled(value) - scaled(low)) / (scaled(high) - scaled(low));
    return { ...axis, share };
  });
  x.labels = x.ticks.map((tick, index) => [x.share(tick), x.labels[index]]);
  y.labels = y.ticks.map((tick, index) => [1 - y.share(tick), y.labels[index]]);
  const box = frame(plot, x, y), points = [];
  const grid = [...x.labels.map(([at]) => `M${box.across(at)} ${box.top}V${box.bottom}`),
    ...y.labels.map(([at]) => `M${box.left} ${box.down(at)}H${box.right}`)];
  add(box.svg, "path", { d: grid.join(""), class: "grid-lines" });
  for (const line of lines) {
    const group = add(box.svg, "g", { class: "line", style: `--l: ${line.colour[0]}; --d: ${line.colour[1]}` });
    const path = add(group, "path", { "stroke-dasharray": DASHES[line.dash] });
    let pen = "M", d = "";
    line.x.forEach((value, index) => {
      if (line.y[index] === null) { pen = "M"; return; }
      const [left, top] = [box.across(x.share(value)), box.down(1 - y.share(line.y[index]))];
      d += `${pen}${left} ${top}`;
      pen = "L";
      points.push({ left, top, text: line.hover[index] });
      const shape = { d: MARKERS[line.marker], transform: `translate(${left} ${top})`, class: line.hollow ? "hollow" : "full" };
      if (line.marker) add(group, "path", shape);
    });
    path.setAttribute("d", d);
  }
  return (left, top) => {
    const far = (point) => Math.hypot(point.left - left, point.top - top);
    const near = points.reduce((best, point) => (best && far(best) <= far(point) ? best : point), null);
    return near && far(near) < 30 ? near.text : null;
  };
}

function draw(plot) {
  if (!drawn.has(plot)) {
    const figure = JSON.parse(plot.querySelector("script").textContent);
    drawn.set(plot, { figure });
    resized.observe(plot);
    plot.addEventListener("pointermove", hovered);
    plot.addEventListener("pointerdown", hovered);
    plot.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
  const entry = drawn.get(plot);
  entry.width = plot.clientWidth;
  entry.hover = (entry.figure.kind === "heat" ? heat : lines)(plot, entry.figure);
}

function hovered({ currentTarget, clientX, clientY }) {
  const { left, top } = currentTarget.getBoundingClientRect();
  const text = drawn.get(currentTarget).hover(clientX - left, clientY - top);
  tip.hidden = text === null;
  if (text === null) return;
  tip.textContent = text;
  tip.style.left = `${Math.max(4, Math.min(clientX + 14, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${clientY + 18 + tip.offsetHeight > innerHeight ? clientY - tip.offsetHeight - 12 : clientY + 18}px`;
}

// A page may hold hundreds of figures, most of them behind a picker: those are drawn when they are picked.
const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.clientWidth && target.clientWidth !== drawn.get(target).width) draw(target);
  }
});
const waiting = [...document.querySelectorAll(".plot")].filter((plot) => plot.offsetParent);
(function next() {
  if (waiting.length) { draw(waiting.shift()); setTimeout(next); }
})();
dark.addEventListener("change", () => drawn.forEach((_, plot) => { if (plot.offsetParent) draw(plot); }));

for (const picker of document.querySelectorAll(".picker")) {
  const select = picker.querySelector("select");
  if (!select) continue;
  const options = [...picker.querySelectorAll(":scope > .option")];
  const show = () => {
    options.forEach((option, index) => { option.hidden = index !== select.selectedIndex; });
    options[select.selectedIndex].querySelectorAll(".plot").forEach(draw);
  };
  select.addEventListener("change", show);
  for (const button of picker.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const count = options.length;
      select.selectedIndex = (select.selectedIndex + Number(button.dataset.step) + count) % count;
      show();
    });
  }
}

const links = new Map([...document.querySelectorAll('nav a[href^="#"]')].map((a) => [a.hash.slice(1), a]));
const here = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    links.get(target.id)?.classList.toggle("here", isIntersecting);
  }
}, { rootMargin: "-20% 0px -75% 0px" });
document.querySelectorAll("section").forEach((section) => here.observe(section));
