// The three panels. NiiVue draws; this file links them, and puts maps over them.
import { draw as drawMarks } from "./marks.js";
import { Niivue } from "./niivue.js";
import { by, element } from "./table.js";

export const NAMES = ["fixed", "warped", "moving"];
export const views = {};
export const canvas = name => by(name).querySelector("canvas");
let result, overlay = "", middle, listeners = [];

// NiiVue compiles some fifty programs for each panel, most of them for renderings, meshes and filters, of which the page
// has none. Without their content they take no time.
const UNUSED = /rayDir|vClr|\bdX\b|labelTex|usampler3D|activeIndex|sampler2D volume/;
const NOTHING = "#version 300 es\nprecision highp float;\nout vec4 colour;\nvoid main() { colour = vec4(0.0); }";

function lean(canvas) {
  const gl = canvas.getContext("webgl2", {alpha: true, antialias: false}), source = gl.shaderSource.bind(gl);
  gl.shaderSource = (shader, text) => source(shader,
    gl.getShaderParameter(shader, gl.SHADER_TYPE) === gl.FRAGMENT_SHADER && UNUSED.test(text) ? NOTHING : text);
  return canvas;
}

async function file(name) {
  const found = await fetch(`${name}.nii`);
  if (!found.ok) throw new Error(found.status === 409 ? (await found.json()).error : `${name} is not there`);
  return found.arrayBuffer();
}

// Open the panels, one after the other, so that the first one can be used while the others are drawn.
export async function open(told) {
  result = told;
  const files = Object.fromEntries(NAMES.map(name => [name, file(name)]));
  for (const name of NAMES) {
    const view = new Niivue({backColor: [0, 0, 0, 1], dragAndDropEnabled: false, isColorbar: false, loadingText: "",
      multiplanarForceRender: false, multiplanarShowRender: 0, crosshairWidth: 0.7, crosshairWidthUnit: "percent",
      isOrientationTextVisible: true, showAllOrientationMarkers: true, fontColor: [1, 1, 0.6, 1],
      crosshairColor: [1, 0.2, 0.2, 0.8], isRadiologicalConvention: false, logLevel: "error"});
    for (const [colours, table] of Object.entries(result.colours)) view.addColormap(colours, table);
    await view.attachToCanvas(lean(canvas(name)), false);
    view.setSliceType(Number(by("slices").value));
    views[name] = view;
    await draw(name, await files[name]);
    const drawScene = view.drawScene.bind(view);
    view.drawScene = (...how) => {
      const drawn = drawScene(...how);
      drawMarks(name, view);
      return drawn;
    };
    view.scene.crosshairPos = fraction(view, middle ?? (middle = result.middle));
    view.drawScene();
    view.onLocationChange = place => moved(name, Array.from(place.mm).slice(0, 3));
  }
  go(middle);
}

async function draw(name, content) {
  await views[name].loadVolumes([{url: content, name: `${name}.nii`, colormap: "gray"}]);
}

// Show another image in a panel.
export async function change(panel, name) {
  await draw(panel, await file(name));
}

// Call `heard(panel, mm)` whenever the crosshair was moved within a panel.
export function onMove(heard) {
  listeners.push(heard);
}

export const place = () => middle;

// Parts of the sides of the images, which NiiVue has, from RAS mm and back. In an oblique image NiiVue's own millimetres
// are others, along its axes.
export const fraction = (view, mm) => view.mm2frac(mm, 0, true);
const millimetres = (view, frac) => Array.from(view.frac2mm(frac, 0, true)).slice(0, 3);

// Every panel goes to a point in RAS mm.
export function go(mm, except = "") {
  const frac = Array.from(fraction(views.fixed, mm)).map(x => Math.min(Math.max(x, 0), 1));
  middle = millimetres(views.fixed, frac);
  for (const [name, view] of Object.entries(views))
    if (name !== except) {
      view.scene.crosshairPos = fraction(view, middle);
      view.drawScene();
    }
  tell();
}

function moved(name, mm) {
  for (const [other, view] of Object.entries(views)) if (other !== name) views[name].doSync2d(view);
  go(mm, name);
  for (const heard of listeners) heard(name, mm);
}

// The numbers at the crosshair, in words.
export function tell() {
  const numbers = [], third = by("third").value;
  for (const volume of [...Object.values(views).map(view => view.volumes[0]), ...views.fixed.volumes.slice(1)]) {
    if (!volume) continue;
    const name = volume.name.replace(".nii", ""), map = result.overlays[name];
    if (name === "labels") continue;
    const [x, y, z] = volume.mm2vox(middle), value = volume.getValue(x, y, z, 0);
    if (!map) numbers.push(`${name === "moving" ? third : name} ${value.toPrecision(4)}`);
    else if (value) numbers.push(map.unit === "mm" ? `${map.name.toLowerCase()} ${value.toFixed(2)} mm`
      : `${map.name.toLowerCase()} ${(2 ** value).toFixed(2)}`);
  }
  const letters = ["RL", "AP", "SI"].map((ends, k) => `${ends[middle[k] <= -0.05 ? 1 : 0]} ${Math.abs(middle[k]).toFixed(1)}`);
  by("status").textContent = `${letters.join(", ")} mm: ${numbers.join(", ")}`;
}

// The maps that the state of the result has.
export function offer(maps) {
  for (const option of by("overlay").options) option.disabled = option.value !== "" && !maps.includes(option.value);
  if (by("overlay").selectedOptions[0].disabled) by("overlay").value = overlay = "";
  by("outline").hidden = !maps.includes("labels");
  if (by("outline").hidden) by("labels").checked = false;
}

// One change of the maps at a time, as each waits for its files; of changes that wait, the last one counts.
let changing = Promise.resolve(), asked = 0;

export function overlays() {
  const mine = ++asked;
  changing = changing.then(() => mine === asked ? maps() : undefined).catch(error => {
    by("status").textContent = error.message;
  });
  return changing;
}

// The map, and the outlines above it, over the two images that they belong to.
async function maps() {
  const wanted = [overlay, by("labels").checked ? "labels" : ""].filter(name => name);
  if (wanted.length) by("status").textContent = "Loading ...";
  const files = await Promise.all(wanted.map(file));
  for (const view of [views.fixed, views.warped]) {
    for (const volume of view.volumes.slice(1)) view.removeVolume(volume);
    for (const [k, map] of wanted.entries())
      await view.addVolumesFromUrl([{url: files[k], name: `${map}.nii`, colormap: result.overlays[map].colours,
        opacity: map === "labels" ? 1 : by("opacity").value / 100}]);
  }
  legend();
  tell();
}

function opacity() {
  for (const view of Object.values(views))
    view.volumes.forEach((volume, k) => {
      if (k && volume.name !== "labels.nii") view.setOpacity(k, by("opacity").value / 100);
    });
}

function legend() {
  const place = by("legend"), shown = views.fixed.volumes.slice(1);
  place.replaceChildren();
  for (const {name, cal_min: low, cal_max: high} of shown) {
    const {name: title, words, unit, colours} = result.overlays[name.replace(".nii", "")];
    const table = result.colours[colours];
    if (name === "labels.nii") {
      place.append(element("br"), bar(table, 18, true), `${title}: ${words}.`);
      continue;
    }
    const scale = element("span", "", "scale"), row = element("span", "", "ticks");
    for (let k = 0; k < 5; k++) {
      const value = low + (high - low) * k / 4;
      row.append(element("span", unit ? String(Number(value.toPrecision(4))) : value < 0 ? `1/${2 ** -value}` : 2 ** value));
    }
    scale.append(bar(table), row);
    place.append(scale, `${title}${unit ? ` (${unit})` : ""}: ${words}.`);
  }
}

// A bar of a table of colours, over grey as over an image.
function bar(table, width = 260, flat = false) {
  const canvas = document.createElement("canvas");
  canvas.width = width; canvas.height = 12;
  const context = canvas.getContext("2d");
  for (let x = 0; x < width; x++) {
    const at = flat ? 255 : 255 * x / (width - 1);
    let k = table.I.findIndex((place, i) => i && place >= at);
    const t = (at - table.I[k - 1]) / (table.I[k] - table.I[k - 1]);
    const [r, g, b, a] = ["R", "G", "B", "A"].map(key => table[key][k - 1] * (1 - t) + table[key][k] * t);
    context.fillStyle = "#555";
    context.fillRect(x, 0, 1, 12);
    context.fillStyle = `rgba(${r}, ${g}, ${b}, ${a / 255})`;
    context.fillRect(x, 0, 1, 12);
  }
  return canvas;
}

let blinking;

export function mode() {
  const panels = by("panels");
  panels.className = by("mode").value;
  by("warped").style.clipPath = "";
  clearInterval(blinking);
  if (panels.className === "swipe") swipe();
  if (["blink", "old"].includes(panels.className)) blinking = setInterval(() => panels.classList.toggle("other"), 700);
  window.dispatchEvent(new Event("resize"));  // NiiVue takes the new size of its canvases
}

function swipe() {
  by("warped").style.clipPath = `inset(0 0 0 ${by("swipe").value}%)`;
}

// Keys in a panel move the crosshair: through the slice left and right, up and down, and from slice to slice. NiiVue has
// keys of its own, which move one panel alone.
const AXES = {3: [0, 2, 1], 0: [0, 1, 2], 1: [0, 2, 1], 2: [1, 2, 0]};
const STEPS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowDown: [1, -1], ArrowUp: [1, 1], PageDown: [2, -1], PageUp: [2, 1]};

function key(event) {
  if (!event.target.matches("#panels canvas")) return;
  event.stopPropagation();
  if (event.type !== "keydown" || !STEPS[event.key]) return;
  event.preventDefault();
  const [axis, sign] = STEPS[event.key], mm = [...middle];
  mm[AXES[by("slices").value][axis]] += sign * (event.shiftKey ? 5 : 1);
  go(mm);
}

for (const type of ["keydown", "keyup"]) by("panels").addEventListener(type, key, {capture: true});
by("mode").addEventListener("change", mode);
by("swipe").addEventListener("input", swipe);
by("opacity").addEventListener("input", opacity);
by("labels").addEventListener("change", overlays);
by("overlay").addEventListener("change", event => { overlay = event.target.value; overlays(); });
by("slices").addEventListener("change", event => {
  for (const view of Object.values(views)) view.setSliceType(Number(event.target.value));
});
