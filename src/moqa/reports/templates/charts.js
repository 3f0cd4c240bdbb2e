"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
const sources = new Map();

// Every light colour of the palette becomes its dark twin; scales are named in `meta`. Typed arrays pass untouched.
function themed(value) {
  if (typeof value === "string") return dark.matches ? COLOURS.dark[value] ?? value : value;
  if (Array.isArray(value)) return value.map(themed);
  if (value === null || typeof value !== "object") return value;
  if ("bdata" in value) return { ...value };
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, themed(inner)]));
}

function coloured(figure) {
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(name).trim();
  const { data, layout } = themed(figure);
  for (const trace of data) {
    const scale = COLOURS.scales[trace.meta];
    if (scale) trace.colorscale = scale[dark.matches ? 1 : 0].map((c, i, all) => [i / (all.length - 1), c]);
  }
  const font = getComputedStyle(document.body).fontFamily;
  layout.font = { family: font, size: 12, color: colour("--muted") };
  layout.hoverlabel = {
    ...layout.hoverlabel, bgcolor: colour("--page"), bordercolor: colour("--strong"),
    font: { family: font, size: 12.5, color: colour("--text") },
  };
  for (const key of Object.keys(layout).filter((name) => /^[xy]axis/.test(name))) {
    const axis = layout[key];
    Object.assign(axis, { gridcolor: colour("--line"), zerolinecolor: colour("--strong"), linecolor: colour("--line") });
    if (axis.title) axis.title.font = { size: 12, color: colour("--muted") };
  }
  return { data, layout };
}

function draw(plot) {
  if (!sources.has(plot)) {
    const script = plot.querySelector("script");
    sources.set(plot, JSON.parse(script.textContent));
    script.remove();
  }
  const { data, layout } = coloured(sources.get(plot));
  Plotly.react(plot, data, layout, { responsive: true, displayModeBar: false });
}

// A page may hold hundreds of figures, most of them behind a picker: those are drawn when they are picked.
const waiting = [...document.querySelectorAll(".plot")].filter((plot) => plot.offsetParent);
(function next() {
  if (waiting.length) { draw(waiting.shift()); setTimeout(next); }
})();
dark.addEventListener("change", () => sources.forEach((_, plot) => draw(plot)));

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
