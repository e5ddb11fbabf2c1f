// The page of a result. NiiVue draws; this file says what, links the three panels and lists the checks.
import { Niivue } from "./niivue.js";

// Tables of colours as NiiVue takes them: red, green, blue and opacity at places I from 0 to 255. NiiVue shows an overlay
// wherever its opacity is not 0, so what says little is 0.
const COLOURS = {
  "lengths": {R: [0, 40, 60, 200, 250, 255], G: [0, 15, 20, 50, 160, 255], B: [0, 120, 140, 90, 20, 160],
    A: [0, 0, 255, 255, 255, 255], I: [0, 12, 13, 100, 185, 255]},
  "two sides": {R: [20, 60, 190, 190, 255, 255, 255, 150], G: [60, 150, 220, 220, 215, 215, 120, 0],
    B: [190, 255, 255, 255, 190, 190, 70, 20], A: [255, 255, 255, 0, 0, 255, 255, 255],
    I: [0, 70, 119, 120, 135, 136, 186, 255]},
  "one colour": {R: [0, 255], G: [0, 220], B: [0, 60], A: [0, 255], I: [0, 255]},
};
const NAMES = ["fixed", "warped", "moving"];
const by = id => document.getElementById(id);
const views = {};
let result, overlay = "";

function element(tag, text = "", cls = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = cls;
  return made;
}

async function start() {
  result = await (await fetch("result.json")).json();
  by("title").textContent = document.title = result.title;
  for (const name of NAMES) {
    const view = new Niivue({backColor: [0, 0, 0, 1], show3Dcrosshair: true, dragAndDropEnabled: false, isColorbar: false,
      multiplanarForceRender: false, multiplanarShowRender: 0, crosshairWidth: 0.7, crosshairWidthUnit: "percent", isOrientationTextVisible: true, showAllOrientationMarkers: true,
      fontColor: [1, 1, 0.6, 1], crosshairColor: [1, 0.2, 0.2, 0.8],
      isRadiologicalConvention: false, loadingText: ""});
    for (const [colours, table] of Object.entries(COLOURS)) view.addColormap(colours, table);
    await view.attachToCanvas(by(name).querySelector("canvas"));
    const [low, high] = result.range[name];
    await view.loadVolumes([{url: `${name}.nii`, name: `${name}.nii`, colormap: "gray", cal_min: low, cal_max: high}]);
    view.setSliceType(view.sliceTypeMultiplanar);
    views[name] = view;
  }
  for (const name of NAMES) views[name].onLocationChange = place => moved(name, place);
  for (const [name, map] of Object.entries(result.overlays))
    if (name !== "labels") by("overlay").append(new Option(map.name, name));
  by("outline").hidden = !("labels" in result.overlays);
  checks();
  landmarks();
  go(result.middle);
  document.body.dataset.ready = "yes";
}

// Every panel goes to a point in RAS mm.
function go(mm, except = "") {
  for (const name of NAMES) {
    const view = views[name];
    if (name !== except) {
      view.scene.crosshairPos = view.mm2frac(mm);
      view.drawScene();
    }
  }
  tell(mm);
}

function moved(name, place) {
  const view = views[name];
  for (const other of NAMES) if (other !== name) view.doSync2d(views[other]);
  go(Array.from(place.mm).slice(0, 3), name);
}

// The numbers at the crosshair, in words.
function tell(mm) {
  const numbers = [];
  for (const volume of [...NAMES.map(name => views[name].volumes[0]), ...views.fixed.volumes.slice(1)]) {
    const map = result.overlays[volume.name.replace(".nii", "")];
    if (map === result.overlays.labels && map) continue;
    const [x, y, z] = volume.mm2vox(mm), value = volume.getValue(x, y, z, 0);
    if (!map) numbers.push(`${volume.name.replace(".nii", "")} ${value.toPrecision(4)}`);
    else if (value) numbers.push(map.unit === "mm" ? `${map.name.toLowerCase()} ${value.toFixed(2)} mm`
      : `${map.name.toLowerCase()} ${(2 ** value).toFixed(2)}`);
  }
  const letters = ["RL", "AP", "SI"].map((ends, k) => `${ends[mm[k] < 0 ? 1 : 0]} ${Math.abs(mm[k]).toFixed(1)}`);
  by("status").textContent = `${letters.join(", ")} mm: ${numbers.join(", ")}`;
}

// One change of the maps at a time, as each waits for its files; of changes that wait, the last one counts.
let changing = Promise.resolve(), asked = 0;

function overlays() {
  const mine = ++asked;
  changing = changing.then(() => mine === asked ? changed() : undefined);
}

// The map, and the outlines above it, over the two images that they belong to.
async function changed() {
  const wanted = [overlay, by("labels").checked ? "labels" : ""].filter(name => name);
  by("status").textContent = "Loading ...";
  for (const view of [views.fixed, views.warped]) {
    for (const volume of view.volumes.slice(1)) view.removeVolume(volume);
    for (const map of wanted) {
      const {low, high, colours} = result.overlays[map];
      await view.addVolumesFromUrl([{url: `${map}.nii`, name: `${map}.nii`, colormap: colours, cal_min: low, cal_max: high,
        opacity: map === "labels" ? 1 : by("opacity").value / 100}]);
    }
  }
  legend();
  tell(Array.from(views.fixed.frac2mm(views.fixed.scene.crosshairPos)).slice(0, 3));
}

function opacity() {
  for (const view of Object.values(views))
    view.volumes.forEach((volume, k) => {
      if (k && volume.name !== "labels.nii") view.setOpacity(k, by("opacity").value / 100);
    });
}

function legend() {
  const place = by("legend");
  place.replaceChildren();
  if (overlay) {
    const {name, words, unit, ticks, colours} = result.overlays[overlay], scale = element("span", "", "scale");
    scale.append(bar(COLOURS[colours]));
    const row = element("span", "", "ticks");
    for (const [, text] of ticks) row.append(element("span", text));
    scale.append(row);
    place.append(scale, `${name}${unit ? ` (${unit})` : ""}: ${words}.`);
  }
  if (by("labels").checked) {
    const {name, words} = result.overlays.labels;
    place.append(element("br"), bar(COLOURS["one colour"], 18, true), `${name}: ${words}.`);
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

function table(place, heads, rows) {
  const made = element("table"), head = element("tr");
  for (const text of heads) head.append(element("th", text));
  made.append(head, ...rows);
  place.replaceChildren(made);
}

function row(cells) {
  const made = element("tr");
  for (const cell of cells) {
    const td = element("td");
    td.append(cell);
    made.append(td);
  }
  return made;
}

function shower(mm) {
  if (!mm) return "";
  const button = element("button", "show");
  button.addEventListener("click", () => go(mm));
  return button;
}

function checks() {
  const number = x => x === null ? "" : String(Number(x.toPrecision(3)));
  table(by("checks"), ["", "check", "value", "at least", "at most", "where it is worst", "what it means"], result.checks.map(one => row([
    element("span", one.status, one.status), one.name, number(one.value), ...one.limits.map(number), shower(one.place),
    one.sentence])));
}

function landmarks() {
  by("marks").hidden = !result.landmarks.length;
  table(by("landmarks"), ["landmark", "mm before", "mm after", "", ""], result.landmarks.map(one => row([
    one.name, one.before_mm.toFixed(1), one.after_mm.toFixed(1), shower(one.fixed),
    one.left_out ? element("span", `left out: it ${one.left_out}`, "warn") : ""])));
}

let blinking;

function mode() {
  const panels = by("panels");
  panels.className = by("mode").value;
  by("warped").style.clipPath = "";
  clearInterval(blinking);
  if (panels.className === "swipe") swipe();
  if (panels.className === "blink") blinking = setInterval(() => panels.classList.toggle("other"), 700);
  window.dispatchEvent(new Event("resize"));  // NiiVue takes the new size of its canvases
}

function swipe() {
  by("warped").style.clipPath = `inset(0 0 0 ${by("swipe").value}%)`;
}

by("mode").addEventListener("change", mode);
by("swipe").addEventListener("input", swipe);
by("opacity").addEventListener("input", opacity);
by("labels").addEventListener("change", overlays);
by("overlay").addEventListener("change", event => { overlay = event.target.value; overlays(); });
by("slices").addEventListener("change", event => {
  for (const view of Object.values(views)) view.setSliceType(Number(event.target.value));
});

// The open connection tells the program that the page is there. Where the program ends, the page says so.
const alive = new EventSource("alive");
alive.addEventListener("error", () => { by("status").textContent = "The program has ended. Start it again to go on."; });
addEventListener("pagehide", () => alive.close());

start().catch(error => { by("status").textContent = `The page cannot show the result: ${error.message}`; });
