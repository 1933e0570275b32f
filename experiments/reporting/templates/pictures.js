// The explorer's view of a map whose keys are patches of a picture: weights laid over it.

// The weights [S] of query i of a head, or of the pooled query where i is −1.
function rowOf(map, head, i) {
  const [start, stop] = i < 0 ? map.pooled.slice(1) : [i, i + 1];
  const row = new Array(head.S).fill(0);
  for (let q = start; q < stop; q++) {
    for (let k = 0; k < head.S; k++) row[k] += head.weight(q, k) / (stop - start);
  }
  return row;
}

// The first key that is a patch.
const firstPatch = map => map.shape[3] - map.grid[0] * map.grid[1];

// The unit of a row on the picture: its largest weight, or four equal shares where that is less, so
// that a head which prefers no patch looks so.
const unitOf = (map, row) =>
  Math.max(4 / (map.grid[0] * map.grid[1]), ...row.slice(firstPatch(map)));

// A gray picture with a canvas of its patches over it.
const overlay = (data, map) => make(
  "span", { class: "overlay" },
  make("img", { src: data.pictures[map.picture], alt: "" }), make("canvas", { "aria-hidden": true }));

// Colours the patches of an overlay by √(weight / largest).
function lay(element, map, row, largest) {
  const canvas = element.querySelector("canvas"), [rows, columns] = map.grid;
  const [red, green, blue] = getComputedStyle(canvas).color.match(/[\d.]+/g).map(Number);
  const image = new ImageData(columns, rows);
  row.slice(firstPatch(map)).forEach((weight, k) =>
    image.data.set([red, green, blue, 200 * Math.sqrt(Math.min(1, weight / largest))], 4 * k));
  [canvas.width, canvas.height] = [columns, rows];
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// One cell: its heads, the picture, and over it the chosen head and the rollout.
function pictureView(explorer, id, map, all, rollout) {
  const { data } = explorer, [layer, head] = explorer.chosen(map);
  const query = data.tokens[map.query], key = data.tokens[map.key];
  const [rows, columns] = map.grid, first = firstPatch(map);
  const ofPatches = map.query === map.key;  // else of words
  const chosen = headOf(map, all, layer, head);
  const thumbnails = [];
  const heads = explorer.heads(map, all, one => {
    const element = overlay(data, map);
    thumbnails.push([element, one]);
    return element;
  });
  const named = (text, i) => ofPatches ? text : `${text} (${i + 1})`;
  const nameOf = i => i < 0 ? map.pooled[0] : named(query[i], i);

  // The queries of all cells are those of the first.
  const inFirst = i => sameToken(data, map.query, explorer.map(explorer.state.cell).query, i);
  const show = (i, j) => explorer.point(inFirst(i), j);
  const keep = i => {
    explorer.query = explorer.query === inFirst(i) ? -1 : inFirst(i);
    explorer.point(explorer.query);
  };
  const options = query.map((text, i) => [i, named(text, i)]);
  if (query[0] === map.pooled[0]) options.shift();  // the class token is there already
  const select = choice("query", [[-1, map.pooled[0]], ...options], -1, i => {
    explorer.query = inFirst(Number(i));
    explorer.point(explorer.query);
  });

  const panel = (element, caption) => {
    const mark = make("span", { class: "patch", hidden: "" });
    element.append(mark);
    const under = event => {
      const box = element.getBoundingClientRect();
      const at = (offset, size, count) =>
        Math.max(0, Math.min(count - 1, Math.floor(offset / size * count)));
      return first + at(event.clientY - box.top, box.height, rows) * columns
        + at(event.clientX - box.left, box.width, columns);
    };
    element.onmousemove = event =>
      ofPatches ? show(under(event), -1) : explorer.point(explorer.query, under(event));
    element.onmouseleave = () => explorer.point(explorer.query);
    if (ofPatches) element.onclick = event => keep(under(event));
    return [make("figure", {}, element, make("figcaption", {}, caption)), mark];
  };
  const plain = make("span", { class: "overlay plain" },
    make("img", { src: data.pictures[map.picture], alt: "the picture" }));
  const over = overlay(data, map), flow = rollout ? overlay(data, map) : null;
  const panels = [
    panel(plain, "picture"), panel(over, `layer ${layerName(map, layer)}, head ${head + 1}`)];
  if (flow) panels.push(panel(flow, "attention rollout"));
  if (ofPatches) {
    const label = `${rows} × ${columns} patches of the picture: arrow keys choose the query`;
    for (const [name, value] of [["tabindex", 0], ["role", "application"], ["aria-label", label]]) {
      plain.setAttribute(name, value);
    }
    plain.onkeydown = event => {
      const step = {
        ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
      if (!step && event.key !== "Escape") return;
      event.preventDefault();
      if (!step) {
        explorer.query = -1;
        return explorer.point(-1);
      }
      const at = current - first, inside = current >= first;
      const row = inside ? Math.floor(at / columns) + step[0] : 0;
      const column = inside ? at % columns + step[1] : 0;
      if (row < 0 || row >= rows || column < 0 || column >= columns) return;
      explorer.query = inFirst(first + row * columns + column);
      explorer.point(explorer.query);
    };
  }

  // Of a caption, what the chosen head looks at word by word.
  const words = ofPatches ? [] : query.map((text, i) => {
    const element = overlay(data, map);
    const button = make("button", { type: "button", "aria-pressed": false, "aria-label": nameOf(i) },
      element, make("span", {}, text));
    button.onmouseover = () => show(i, -1);
    button.onmouseleave = () => explorer.point(explorer.query);
    button.onclick = () => keep(i);
    return [button, element];
  });
  const said = make("p", { class: "classes" });
  said.append(map.prediction ? "Class: " : "Caption: ", make("strong", {}, map.truth));
  if (map.prediction) {
    const color = map.prediction === map.truth ? "" : "worse";
    said.append("; the model says ", make("strong", { class: color }, map.prediction), ".");
  }
  const readout = make("p", { class: "readout", "aria-live": "polite" });
  const element = make(
    "div", { class: "panel of-picture" }, make("h4", {}, data.labels[id]), said, heads,
    make("div", { class: "controls" }, select),
    make("div", { class: "pictures" }, ...panels.map(([figure]) => figure)),
    make("div", { class: "words" }, ...words.map(([button]) => button)),
    readout);

  const cached = new Map();
  const rowsOf = i => {
    if (!cached.has(i)) cached.set(i, thumbnails.map(([, one]) => rowOf(map, one, i)));
    return cached.get(i);
  };
  const ofWords = words.map((_, i) => rowOf(map, chosen, i));
  let current = -1;
  const strongest = i => Math.max(...rowsOf(i).map(row => unitOf(map, row)));
  const paint = () => {
    const largest = Math.max(...ofWords.map(row => unitOf(map, row)));
    words.forEach(([, element], i) => lay(element, map, ofWords[i], largest));
  };
  const point = (i, j, largest) => {
    current = i;
    rowsOf(i).forEach((row, k) => lay(thumbnails[k][0], map, row, largest));
    const row = rowOf(map, chosen, i);
    lay(over, map, row, largest);
    if (flow) {
      const whole = rowOf(map, rollout, i);
      lay(flow, map, whole, unitOf(map, whole));
    }
    const marked = ofPatches ? i : j;
    for (const [, mark] of panels) {
      mark.hidden = !(marked >= first);
      mark.style.top = `${100 * Math.floor((marked - first) / columns) / rows}%`;
      mark.style.left = `${100 * ((marked - first) % columns) / columns}%`;
      mark.style.height = `${100 / rows}%`;
      mark.style.width = `${100 / columns}%`;
    }
    words.forEach(([button], k) => button.setAttribute("aria-pressed", k === i));
    select.querySelector("select").value = options.some(([k]) => k === i) ? i : -1;
    const ranked = row.map((weight, k) => [weight, k]).sort(([a], [b]) => b - a);
    const strong = ranked.filter(([weight]) => weight >= 0.0005).slice(0, 5)
      .map(([weight, k]) => `${key[k]} ${weight.toFixed(3)}`);
    const there = j >= 0 ? ` Here: ${key[j]} ${row[j].toFixed(3)}.` : "";
    readout.textContent =
      `Layer ${layerName(map, layer)}, head ${head + 1}, entropy ${nats(chosen.entropy)}: `
      + `${nameOf(i)} attends to ${strong.join(", ") || "nothing"}.${there}`;
  };
  return { element, map, paint, point, strongest };
}
