// Marks of landmarks over the panels: a circle with the number, in every slice that is near.
import { by, element } from "./table.js";

const REACH = 5;  // mm from a slice up to which a mark is seen in it; it fades with the distance
const AXES = [[0, 1, 2], [0, 2, 1], [1, 2, 0]];  // of NiiVue's slices: right, up, through
let marks = [];

// Where a point in RAS mm lies in the slices of a view: [x, y, distance from the slice in mm], in pixels of the page.
function spots(view, mm) {
  const at = view.frac2mm(view.mm2frac(mm, 0, true)), found = [], scale = view.uiData.dpr;
  for (const {axCorSag, AxyzMxy: plane, leftTopMM, fovMM, leftTopWidthHeight} of view.screenSlices) {
    if (axCorSag > 2 || plane.length < 4) continue;
    const [x, y, z] = AXES[axCorSag].map(axis => at[axis]), [left, top, width, height] = leftTopWidthHeight;
    const away = Math.abs(z - (plane[2] + plane[4] * (y - plane[1]) - plane[3] * (x - plane[0])));
    const [right, up] = [(x - leftTopMM[0]) / fovMM[0], (y - leftTopMM[1]) / fovMM[1]];
    if (away > REACH || right < 0 || right > 1 || up < 0 || up > 1) continue;
    found.push([(left + right * width) / scale, (top + (1 - up) * height) / scale, away]);
  }
  return found;
}

// Draw the marks of a panel anew, which NiiVue has just drawn.
export function draw(name, view) {
  const place = by(name).querySelector(".marks"), image = name === "moving" ? by("third").value : name, drawn = [];
  for (const {number, places, cls} of marks)
    for (const [x, y, away] of places[image] ? spots(view, places[image]) : []) {
      const mark = element("span", number, cls);
      Object.assign(mark.style, {left: `${x}px`, top: `${y}px`, opacity: 1 - 0.8 * away / REACH});
      drawn.push(mark);
    }
  place.replaceChildren(...drawn);
}

// Show these marks: {number, places: {fixed, warped, moving, before}, cls}.
export function show(found, views) {
  marks = found;
  for (const [name, view] of Object.entries(views)) draw(name, view);
}
