// Corrections: landmarks, paint where the images are not to be trusted, stiffness; and the history of what was asked for.
import { canvas, change, go, mode, NAMES, offer, onMove, overlays, place, views } from "./panels.js";
import * as program from "./program.js";
import { button, by, element, row, table } from "./table.js";

const PAINT = 1;  // the value of painted voxels in NiiVue's drawing
let now = null, wanted = null, drawn = Promise.resolve(), tool = "", fixed = null, marks = [], radius;

export function steer(result) {
  radius = result.radius;
  onMove((name, mm) => { if (["paint", "erase"].includes(tool) && name !== "moving") ball(mm, tool === "paint"); });
  for (const name of NAMES) canvas(name).addEventListener("pointerup", () => pointed(name));
}

const ask = (what, content = {}) => program.ask(what, content, words => say(words, true));

function say(words, warn = false) {
  by("said").textContent = words;
  by("said").className = warn ? "warn" : "";
}

// What the program tells: the state of the result, or how far it is with the next.
export function heard(told) {
  const worked = now?.busy;
  now = told;
  by("steer").hidden = false;
  if (told.busy) say(told.busy);
  else if (told.said) say(told.said, told.warn);
  else if (worked) say("");
  enable();
  if (told.at === wanted?.at && told.made === wanted?.made) return;
  const first = !wanted;
  wanted = told;
  drawn = drawn.then(() => told === wanted ? shown(told, first) : undefined).catch(error => say(error.message, true));
}

async function shown(told, first) {
  marks = told.landmarks.map(one => ({...one}));
  by("stiffness").value = told.stiffness;
  stiff();
  by("old").hidden = by("choice").hidden = !told.before;
  by("third").value = told.before ? "before" : "moving";
  list();
  history();
  offer(told.maps);
  if (!first || told.before) await redraw();
  await trusted(told);
  document.body.dataset.at = told.at;
}

async function redraw() {
  by("status").textContent = "Loading ...";
  await change("warped", "warped");
  await third();
  await overlays();
}

async function third() {
  const name = by("third").value;
  by("moving").querySelector("h2").textContent = name === "before" ? "Warped, before" : "Moving, after the affine";
  canvas("moving").setAttribute("aria-label", name === "before" ? "Warped image before" : "Moving image");
  await change("moving", name);
  if (by("mode").value === "old" && name !== "before") by("mode").value = "side";
  mode();
}

function enable() {
  const idle = now && !now.busy && now.able;
  for (const id of ["add", "paint", "erase", "go"]) by(id).disabled = !idle;
  by("undo").disabled = !idle || !now.at;
  by("redo").disabled = !idle || now.at === now.steps.length;
  by("export").disabled = !idle || !now.at;
}

// Landmarks: a point of the fixed image, then the same structure in the warped or the moving image.

function choose(name) {
  tool = tool === name ? "" : name;
  fixed = null;
  for (const id of ["add", "paint", "erase"]) by(id).setAttribute("aria-pressed", String(id === tool));
  if (tool) ask("warm").catch(quiet);
  if (tool && by("mode").value !== "side") { by("mode").value = "side"; mode(); }
  say(tool === "add" ? "Click on a structure in the fixed image." : tool === "paint" ?
    "Drag over what is not to be trusted, in the fixed or the warped image." : tool === "erase" ?
      "Drag over what is to be trusted again." : "");
}

function pointed(name) {
  if (tool === "add") mark(name);
}

async function mark(name) {
  if (!fixed) {
    if (name !== "fixed") return say("Click in the fixed image first.", true);
    fixed = place();
    return say("Now click on the same structure in the warped or the moving image.");
  }
  if (name === "fixed") return say("Now click in the warped or the moving image.", true);
  const panel = name === "moving" ? by("third").value : name, first = fixed;
  const {moving} = await ask("point", {panel, place: place()});
  const names = new Set(marks.map(one => one.name));
  let k = 1;
  while (names.has(`landmark ${k}`)) k++;
  marks.push({name: `landmark ${k}`, fixed: first, moving, radius: null});
  choose("add");
  say(`landmark ${k} is added. Go on computes with it.`);
  list();
}

function list() {
  const told = new Map((now?.told ?? []).map(one => [one.name, one])), mine = new Set(marks.map(one => one.name));
  const entry = (one, name, size, drop) => {
    const found = told.get(one.name);
    return row([name, size, found ? found.before_mm.toFixed(1) : "", found ? found.after_mm.toFixed(1) : "",
      button("show", () => go(one.fixed), `Show ${one.name}`), drop,
      found?.left_out ? element("span", `left out: it ${found.left_out}`, "warn") : ""]);
  };
  const rows = [...told.values()].filter(one => !mine.has(one.name)).map(one => entry(one, one.name, "", ""));
  rows.push(...marks.map((one, k) => {
    const name = element("input"), size = element("input");
    name.value = one.name;
    name.setAttribute("aria-label", `Name of ${one.name}`);
    name.addEventListener("change", () => { one.name = name.value; });
    Object.assign(size, {type: "number", min: 1, max: 100, step: "any", placeholder: radius, value: one.radius ?? ""});
    size.setAttribute("aria-label", `Radius of ${one.name} in mm`);
    size.addEventListener("change", () => { one.radius = size.value === "" ? null : Number(size.value); });
    const drop = () => { marks.splice(k, 1); list(); by("add").focus(); };
    return entry(one, name, size, button("delete", drop, `Delete ${one.name}`));
  }));
  by("landmarks").replaceChildren(rows.length ? table(
    ["landmark", "radius (mm)", "mm before", "mm after", "", "", ""], rows) : "");
}

// Paint: balls of voxels in NiiVue's drawing, which the fixed and the warped image share.

function drawing() {
  if (!views.fixed.drawBitmap) views.fixed.createEmptyDrawing();
  return views.fixed.drawBitmap;
}

function shared() {
  for (const view of [views.fixed, views.warped]) {
    if (!view.drawBitmap) view.createEmptyDrawing();  // which makes the texture
    view.drawBitmap = views.fixed.drawBitmap;
    view.setDrawOpacity(0.45);
    view.refreshDrawing(true);
  }
}

function ball(mm, on) {
  const bitmap = drawing(), volume = views.fixed.volumes[0];
  const [, nx, ny, nz] = volume.dimsRAS, [, ...size] = volume.pixDimsRAS, reach = Number(by("brush").value);
  const centre = Array.from(views.fixed.frac2vox(views.fixed.mm2frac(mm)));
  const span = (axis, n) => [Math.max(0, Math.ceil(centre[axis] - reach / size[axis])),
    Math.min(n - 1, Math.floor(centre[axis] + reach / size[axis]))];
  const [x0, x1] = span(0, nx), [y0, y1] = span(1, ny), [z0, z1] = span(2, nz);
  for (let z = z0; z <= z1; z++)
    for (let y = y0; y <= y1; y++)
      for (let x = x0; x <= x1; x++) {
        const d = [x, y, z].map((at, axis) => (at - centre[axis]) * size[axis]);
        if (d[0] ** 2 + d[1] ** 2 + d[2] ** 2 <= reach ** 2) bitmap[x + nx * (y + ny * z)] = on ? PAINT : 0;
      }
  shared();
}

// The drawing of the state, from the program.
async function trusted(told) {
  if (!told.distrust) {
    if (views.fixed.drawBitmap) { views.fixed.createEmptyDrawing(); shared(); }
    return;
  }
  await views.fixed.loadDrawingFromUrl("distrust.nii");
  shared();
}

// The drawing as a compressed NIfTI file in base64, or null where nothing is painted.
async function painted() {
  if (!views.fixed.drawBitmap?.some(x => x)) return null;
  const file = await views.fixed.saveImage({filename: "", isSaveDrawing: true});
  const packed = new Blob([file]).stream().pipeThrough(new CompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(packed).arrayBuffer());
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

function stiff() {
  const mm = Number(by("stiffness").value);
  by("stiff").textContent = mm ? `${mm} mm` : "as found";
}

function history() {
  const number = x => x == null ? "" : x.toFixed(3);
  const words = now.steps.map((one, k) => `${k + 1}${k + 1 === now.at ? " (shown)" : ""}: ${one.words}; similarity there ` +
    `${number(one.similarity_before)} before, ${number(one.similarity_after)} after`);
  by("history").textContent = words.length ? `History: ${words.join(" · ")}` : "";
}

const quiet = () => {};  // `ask` has said it
const acts = {
  add: () => choose("add"), paint: () => choose("paint"), erase: () => choose("erase"),
  go: async () => {
    if (tool) choose("");
    await ask("go", {landmarks: marks, distrust: await painted(), stiffness: Number(by("stiffness").value)});
  },
  undo: () => ask("undo"), redo: () => ask("redo"), export: () => ask("export")};
const press = id => { if (!by(id).disabled) Promise.resolve(acts[id]()).catch(quiet); };
for (const id of Object.keys(acts)) by(id).addEventListener("click", () => press(id));
by("stiffness").addEventListener("input", stiff);
by("third").addEventListener("change", third);

const KEYS = {g: "go", u: "undo", r: "redo", e: "export"};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input:not([type=range]), select")) return;
  const key = event.key.toLowerCase(), panel = NAMES.find(name => canvas(name) === event.target);
  if (key === "escape" && tool) choose("");
  else if (key === "l" && panel && !by("add").disabled) {
    if (tool !== "add") choose("add");
    mark(panel).catch(quiet);
  } else if (key === "d" && panel && !by("paint").disabled) ball(place(), !event.shiftKey);
  else if (KEYS[key]) press(KEYS[key]);
  else return;
  event.preventDefault();
  event.stopPropagation();
}, {capture: true});
