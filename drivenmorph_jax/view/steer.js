// Corrections: landmarks, pairs of labels, paint where the images are not to be trusted, stiffness; and the history of what
// was asked for. The program keeps what is marked, and tells all pages.
import { canvas, change, fraction, go, mode, NAMES, offer, onMove, overlays, place, views } from "./panels.js";
import * as marker from "./marks.js";
import * as program from "./program.js";
import { button, by, element, row, table } from "./table.js";

const PAINT = 1;  // the value of painted voxels in NiiVue's drawing
const ME = crypto.randomUUID();  // this page, among those of the program
let now = null, seen = null, drawn = Promise.resolve(), kept = Promise.resolve(), drafts = 0;
let tool = "", fixed = null, stroke = false, marks = [], pairs = [], radius, checked;

// `checks(list)` shows the checks of what is shown.
export function steer(result, checks) {
  radius = result.radius;
  checked = checks;
  onMove((name, mm) => {
    if (!["paint", "erase"].includes(tool) || name === "moving") return;
    ball(mm, tool === "paint");
    stroke = true;
  });
  for (const name of NAMES) canvas(name).addEventListener("pointerup", event => pointed(name, event));
  document.addEventListener("pointerup", () => { if (stroke) keep(); stroke = false; });
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
  drawn = drawn.then(() => {
    const told = now, changed = key => told[key] !== seen?.[key], first = !seen;
    if (changed("at") || changed("made")) { seen = told; return shown(told, first); }
    if (changed("drafted")) { seen = told; return drafted(told); }
  }).catch(error => say(error.message, true));
}

async function shown(told, first) {
  by("old").hidden = by("choice").hidden = !told.before;
  by("third").value = told.before ? "before" : "moving";
  history();
  offer(told.maps);
  checked(told.checks);
  if (!first || told.before) await redraw();
  await drafted(told, true);
  document.body.dataset.at = told.at;
}

// What is marked, on this page or on another one; unless this page has marked more since.
async function drafted(told, all = false) {
  const mine = told.drafter.startsWith(ME);
  if (!all && mine && told.drafter !== draft()) return;
  marks = told.landmarks.map(one => ({...one}));
  pairs = told.label_pairs.map(one => ({...one}));
  by("stiffness").value = told.stiffness;
  by("pairing").hidden = !told.labels;
  stiff();
  list();
  if (all || !mine) await trusted(told);
  document.body.dataset.drafted = told.drafted;
}

// All that is asked for, as the program takes it.
async function asked() {
  return {landmarks: marks, label_pairs: pairs.map(one => [one.fixed, one.moving]), distrust: await painted(),
    stiffness: Number(by("stiffness").value), page: draft()};
}

const draft = () => `${ME} ${drafts}`;

// The program has ended.
export function ended(words) {
  now = {...now, able: false};
  enable();
  say(words, true);
}

// Let the program keep what is marked. Where it refuses, the page shows again what the program has.
function keep() {
  drafts++;
  kept = kept.then(async () => ask("draft", await asked())).catch(() => drafted(now, true));
  return kept;
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
  for (const id of ["add", "paint", "erase", "join", "stiffness", "go"]) by(id).disabled = !idle;
  for (const one of by("landmarks").querySelectorAll("input, .edit")) one.disabled = !idle;
  by("undo").disabled = !idle || !now.undoable;
  by("redo").disabled = !idle || !now.redoable;
  by("export").disabled = !idle || !now.at;
}

// Landmarks: a point of the fixed image, then the same structure in the warped or the moving image.

function choose(name) {
  tool = tool === name ? "" : name;
  fixed = null;
  marked();
  for (const id of ["add", "paint", "erase"]) by(id).setAttribute("aria-pressed", String(id === tool));
  if (tool) ask("warm").catch(quiet);
  if (tool && by("mode").value !== "side") { by("mode").value = "side"; mode(); }
  say(tool === "add" ? "Click on a structure in the fixed image." : tool === "paint" ?
    "Drag over what is not to be trusted, in the fixed or the warped image." : tool === "erase" ?
      "Drag over what is to be trusted again." : "");
}

function pointed(name, {offsetX, offsetY}) {
  if (tool !== "add") return;
  const {uiData: {dpr}} = views[name];
  if (views[name].canvasPos2frac([offsetX * dpr, offsetY * dpr])[0] < 0) return say("Click on an image, not beside it.", true);
  mark(name).catch(quiet);
}

async function mark(name) {
  if (!fixed) {
    if (name !== "fixed") return say("Click in the fixed image first.", true);
    fixed = place();
    marked();
    return say("Now click on the same structure in the warped or the moving image.");
  }
  if (name === "fixed") return say("Now click in the warped or the moving image.", true);
  const panel = name === "moving" ? by("third").value : name, first = fixed;
  choose("add");  // a second click of a double click finds it done
  const {moving} = await ask("point", {panel, place: place()});
  const names = new Set(marks.map(one => one.name));
  let k = 1;
  while (names.has(`landmark ${k}`)) k++;
  marks.push({name: `landmark ${k}`, fixed: first, moving, radius: null, weight: 1, places: {}});
  const number = marks.length;
  await keep();
  if (marks.length >= number) say(`landmark ${k} is added. Go on computes with it.`);
}

// A pair of labels: the numbers that are written, or the label at the crosshair.
async function join() {
  const fixed = by("label").value === "" ? (await ask("label", {place: place()})).label : Number(by("label").value);
  const moving = by("onto").value === "" ? fixed : Number(by("onto").value), number = pairs.length + 1;
  pairs.push({fixed, moving});
  await keep();
  if (pairs.length < number) return;
  by("label").value = by("onto").value = "";
  say(`label ${fixed} onto ${moving} is added. Go on computes with it.`);
}

// The marks over the panels: dashed until they are computed, red where a landmark was left out.
function marked() {
  const found = marks.map((one, k) => ({number: k + 1, places: {fixed: one.fixed, ...one.places},
    cls: one.left_out ? "left" : one.after_mm == null ? "asked" : ""}));
  if (fixed) found.push({number: marks.length + 1, places: {fixed}, cls: "asked"});
  marker.show(found, views);
}

function list() {
  const mm = x => x == null ? "" : `${x.toFixed(1)} mm`, dice = x => x == null ? "" : `Dice ${x.toFixed(2)}`;
  const left = one => one?.left_out ? element("span", `left out: it ${one.left_out}`, "warn") : "";
  const rows = (now?.told ?? []).map(one => row(["", one.name, "", "", mm(one.before_mm), mm(one.after_mm),
    button("show", () => go(one.fixed), `Show ${one.name}`), "", left(one)]));
  rows.push(...marks.map((one, k) => row([String(k + 1), field(one, "name", `Name of ${one.name}`, {}),
    field(one, "radius", `Radius of ${one.name} in mm`, {type: "number", min: 1, max: 100, step: "any", placeholder: radius}),
    field(one, "weight", `Weight of ${one.name}`, {type: "number", min: 0.05, max: 1, step: "any", placeholder: 1}, 1),
    mm(one.before_mm), mm(one.after_mm), button("show", () => go(one.fixed), `Show ${one.name}`),
    remove(marks, k, `Delete ${one.name}`), left(one)])), ...pairs.map((one, k) => {
    const name = `label ${one.fixed} onto ${one.moving}`;
    return row(["", name, "", "", dice(one.dice_before), dice(one.dice_after),
      one.place ? button("show", () => go(one.place), `Show ${name}`) : "", remove(pairs, k, `Delete ${name}`), left(one)]);
  }));
  const here = by("landmarks").contains(document.activeElement) ? document.activeElement : null;
  by("landmarks").replaceChildren(rows.length ? table(
    ["", "landmark or label", "radius (mm)", "weight", "before", "after", "", "", ""], rows) : "");
  if (here) {  // what is being written goes on
    const again = by("landmarks").querySelector(`[aria-label="${CSS.escape(here.getAttribute("aria-label"))}"]`);
    if (again?.matches("input")) again.value = here.value;
    again?.focus();
  }
  enable();
  marked();
}

// A field of a landmark. An empty one is `otherwise`.
function field(one, key, label, how, otherwise = null) {
  const made = Object.assign(element("input"), how);
  made.value = one[key] === otherwise ? "" : one[key];
  made.setAttribute("aria-label", label);
  made.addEventListener("change", () => {
    one[key] = key === "name" ? made.value : made.value === "" ? otherwise : Number(made.value);
    keep();
  });
  return made;
}

function remove(some, k, label) {
  const made = button("delete", () => { some.splice(k, 1); list(); by("add").focus(); keep(); }, label);
  made.classList.add("edit");
  return made;
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
  const centre = Array.from(views.fixed.frac2vox(fraction(views.fixed, mm)));
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
  join,
  go: async () => {
    if (tool) choose("");
    await ask("go", await asked());
  },
  undo: () => ask("undo"), redo: () => ask("redo"), export: () => ask("export")};
const press = id => { if (!by(id).disabled) kept.then(acts[id]).catch(quiet); };
for (const id of Object.keys(acts)) by(id).addEventListener("click", () => press(id));
by("stiffness").addEventListener("input", stiff);
by("stiffness").addEventListener("change", keep);
by("third").addEventListener("change", third);

const KEYS = {g: "go", u: "undo", r: "redo", e: "export"};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input:not([type=range]), select")) return;
  const key = event.key.toLowerCase(), panel = NAMES.find(name => canvas(name) === event.target);
  if (key === "escape" && tool) choose("");
  else if (key === "l" && panel && !by("add").disabled) {
    if (tool !== "add") choose("add");
    mark(panel).catch(quiet);
  } else if (key === "d" && panel && !by("paint").disabled) {
    ball(place(), !event.shiftKey);
    keep();
  } else if (KEYS[key]) press(KEYS[key]);
  else return;
  event.preventDefault();
  event.stopPropagation();
}, {capture: true});
