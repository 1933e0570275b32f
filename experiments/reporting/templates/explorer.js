// The attention explorer: what a head of a cell attends to, on an example.

// The levels of a map, round(255 √(w / largest)), as Uint8Array [L, H, T, S].
function levels(map) {
  map.levels ??= (async () => {
    const bytes = Uint8Array.from(atob(map.bytes), c => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  })();
  return map.levels;
}

// One head of a map: its levels [T, S], the weight of a pair, and its entropy in nats.
function headOf(map, all, layer, head) {
  const [, H, T, S] = map.shape, start = (layer * H + head) * T * S;
  const own = all.subarray(start, start + T * S);
  const weight = (i, j) => map.largest * (own[i * S + j] / 255) ** 2;
  return { T, S, levels: own, largest: map.largest, weight, entropy: map.entropy[layer][head] };
}

// Draws a head in the colour of the page: a square is as opaque as √(weight / largest).
function draw(canvas, { T, S, levels: own, largest: ownLargest }, scale, largest) {
  const [red, green, blue] = getComputedStyle(canvas).color.match(/[\d.]+/g).map(Number);
  const share = Math.sqrt(ownLargest / largest);
  const image = new ImageData(S, T);
  own.forEach((level, k) => image.data.set([red, green, blue, level * share], 4 * k));
  const small = make("canvas", { width: S, height: T });
  small.getContext("2d").putImageData(image, 0, 0);
  [canvas.width, canvas.height] = [S * scale, T * scale];
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

// What a layer is called: its number, and what it is where the layers of a model differ.
const layerName = (map, layer) =>
  map.layers ? `${layer + 1}: ${map.layers[layer]}` : `${layer + 1}`;

const digits = entropy => entropy === null ? "–" : entropy.toFixed(2);  // null: weights below 0
const nats = entropy => `${digits(entropy)} nats`;

// Query i of the tokens `from` in the tokens `to` (numbers of lists), by its name; −1 for none.
const sameToken = (data, from, to, i) =>
  from === to ? i : data.tokens[to].indexOf(data.tokens[from][i]);

class Explorer {
  constructor(place) {
    this.place = place;
    this.data = JSON.parse(document.getElementById(place.dataset.maps).textContent);
    this.cells = Object.keys(this.data.cells);
    this.key = `explorer ${location.pathname} ${place.dataset.maps}`;
    this.state = { cell: this.cells[0], other: "", example: 0, kind: "", layer: 0, head: 0 };
    try {  // what was chosen before the page was loaded anew
      Object.assign(this.state, JSON.parse(sessionStorage.getItem(this.key) ?? "{}"));
    } catch { /* no storage here */ }
    this.query = -1;  // the one that is kept
    this.controls = make("div", { class: "controls" });
    this.panels = make("div", { class: "panels" });
    this.strip = make("div", { class: "strip" });
    const title = make("h4", {}, "The same head on the same example, cell by cell");
    this.strips = make("details", { open: "" }, make("summary", {}, title), this.strip);
    place.replaceChildren(this.controls, this.panels, this.strips);
    this.show();
  }

  map(cell) {
    return this.data.cells[cell]?.[this.state.example]?.[this.state.kind];
  }

  // Shows anew; the same control keeps the focus.
  async again(changes) {
    const controls = () => [...this.place.querySelectorAll("select, button")];
    const focused = controls().indexOf(document.activeElement);
    Object.assign(this.state, changes);
    await this.show();
    if (focused >= 0 && document.activeElement === document.body) controls()[focused]?.focus();
  }

  set(changes) {
    if ("example" in changes || "kind" in changes) this.query = -1;
    this.again(changes);
  }

  async show() {
    const { data, cells, state } = this;
    if (!(state.cell in data.cells)) state.cell = cells[0];
    if (!(state.other in data.cells)) state.other = "";
    const examples = data.cells[state.cell];
    state.example = Math.min(state.example, examples.length - 1);
    const kinds = Object.keys(examples[state.example]);
    if (!kinds.includes(state.kind)) state.kind = kinds.includes("cross") ? "cross" : kinds[0];
    const map = this.map(state.cell), [L] = map.shape;
    state.layer = Math.min(state.layer, L - 1);
    const H = map.entropy[state.layer].length;
    state.head = Math.min(state.head, H - 1);
    try {
      sessionStorage.setItem(this.key, JSON.stringify(state));
    } catch { /* no storage here */ }
    const range = count => [...Array(count).keys()].map(i => [i, i + 1]);
    const number = name => value => this.set({ [name]: Number(value) });
    const layers = range(L).map(([layer]) => [layer, layerName(map, layer)]);
    const named = cells.map(id => [id, data.labels[id]]);
    const controls = [
      choice("cell", named, state.cell, cell => this.set({ cell })),
      choice("beside", [["", "—"], ...named], state.other, other => this.set({ other })),
      choice("example", range(examples.length), state.example, number("example")),
      choice("layer", layers, state.layer, number("layer")),
      choice("head", range(H), state.head, number("head")),
    ];
    if (kinds.length > 1) {
      const options = kinds.map(kind => [kind, `${kind} attention`]);
      controls.splice(2, 0, choice("kind", options, state.kind, kind => this.set({ kind })));
    }
    this.controls.replaceChildren(...controls);
    const chosen = [...new Set([state.cell, state.other])].filter(Boolean);
    const shown = chosen.filter(id => this.map(id));
    const missing = chosen.filter(id => !this.map(id)).map(id =>
      make("p", { class: "soft" }, `${data.labels[id]} has not kept this example.`));
    const turn = this.turn = (this.turn ?? 0) + 1;
    const largest = Math.max(...shown.map(id => this.map(id).largest));
    const views = await Promise.all(shown.map(id => this.view(id, largest)));
    if (turn !== this.turn) return;  // something else was chosen meanwhile
    this.views = views;
    this.pointStrip = null;
    this.panels.replaceChildren(...this.views.map(view => view.element), ...missing);
    for (const view of this.views) view.paint();
    this.point(this.query);
    await this.all(turn);
  }

  // The layer and head of a map that are chosen, or its last ones.
  chosen(map) {
    const layer = Math.min(this.state.layer, map.shape[0] - 1);
    return [layer, Math.min(this.state.head, map.entropy[layer].length - 1)];
  }

  // A button for each head of each layer, which shows the element that `small` makes of it.
  heads(map, all, small) {
    const [L, H] = map.shape, [layer, head] = this.chosen(map);
    const heads = make("div", { class: "heads", style: `--heads: ${H}` });
    for (let l = 0; l < L; l++) for (let h = 0; h < H; h++) {
      if (h >= map.entropy[l].length) {  // a layer of fewer heads
        heads.append(make("span"));
        continue;
      }
      const one = headOf(map, all, l, h);
      const name = `layer ${layerName(map, l)}, head ${h + 1}, entropy ${nats(one.entropy)}`;
      const button = make(
        "button",
        { type: "button", title: name, "aria-label": name, "aria-pressed": l === layer && h === head },
        small(one), make("span", {}, `${l + 1}.${h + 1} · ${digits(one.entropy)}`));
      button.onclick = () => this.set({ layer: l, head: h });
      heads.append(button);
    }
    return heads;
  }

  // One cell: its heads, the tokens with lines between them, and the heat map.
  textView(id, map, all, largest) {
    const { data } = this, [layer, head] = this.chosen(map);
    const query = data.tokens[map.query], key = data.tokens[map.key];
    const chosen = headOf(map, all, layer, head);
    const thumbnails = [];
    const heads = this.heads(map, all, one => {
      const canvas = make("canvas", { "aria-hidden": true });
      thumbnails.push([canvas, one]);
      return canvas;
    });
    const tokens = (texts, attributes) => make("ol", attributes, ...texts.map((text, i) =>
      make("li", { id: `${this.key}|${id}|${attributes.class}|${i}` }, text)));
    const left = tokens(query, {
      class: "queries", role: "listbox", tabindex: 0, "aria-label": "queries" });
    for (const item of left.children) {
      item.setAttribute("role", "option");
      item.setAttribute("aria-selected", false);
    }
    const right = tokens(key, { class: "keys", "aria-label": "keys" });
    const lines = make("canvas", { class: "lines", "aria-hidden": true });
    const heat = make("canvas", {
      class: "heat", role: "img",
      "aria-label": `weights of ${query.length} queries on ${key.length} keys` });
    const mark = make("div", { class: "mark", hidden: "" });
    const readout = make("p", { class: "readout", "aria-live": "polite" });
    const scale = Math.max(2, Math.min(16, Math.floor(384 / Math.max(chosen.T, chosen.S))));
    left.onmouseover = event => {
      const i = [...left.children].indexOf(event.target);
      if (i >= 0) this.point(i);
    };
    left.onmouseleave = heat.onmouseleave = () => this.point(this.query);
    const keep = i => {
      this.query = this.query === i ? -1 : i;
      this.point(this.query);
    };
    left.onclick = event => {
      const i = [...left.children].indexOf(event.target);
      if (i >= 0) keep(i);
    };
    left.onkeydown = event => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") this.query = -1;
      else if (step) this.query = Math.max(0, Math.min(query.length - 1, this.query + step));
      else return;
      event.preventDefault();
      this.point(this.query);
      left.children[this.query]?.scrollIntoView({ block: "nearest" });
    };
    const under = event => {
      const box = heat.getBoundingClientRect();
      const at = (offset, size, count) =>
        Math.max(0, Math.min(count - 1, Math.floor(offset / size * count)));
      return [at(event.clientY - box.top, box.height, chosen.T),
              at(event.clientX - box.left, box.width, chosen.S)];
    };
    heat.onmousemove = event => this.point(...under(event));
    heat.onclick = event => keep(under(event)[0]);

    const paint = () => {
      for (const [canvas, one] of thumbnails) draw(canvas, one, 1, largest);
      draw(heat, chosen, scale, largest);
    };
    const point = (i, j = -1) => {
      const active = i >= 0 && i < chosen.T;
      [...left.children].forEach((item, k) => item.setAttribute("aria-selected", k === i));
      left.setAttribute("aria-activedescendant", active ? left.children[i].id : "");
      [...right.children].forEach((item, k) => {
        const share = active ? Math.sqrt(chosen.weight(i, k) / largest) : 0;
        item.style.setProperty("--share", `${Math.round(100 * share)}%`);
      });
      mark.hidden = !active;
      mark.style.top = `${100 * i / chosen.T}%`;
      mark.style.height = `${100 / chosen.T}%`;
      this.lines(lines, left, right, chosen, largest, active ? i : -1);
      const ranked = active ? key.map((text, k) => [chosen.weight(i, k), k]) : [];
      ranked.sort(([a], [b]) => b - a);
      const told = ranked.filter(([w]) => w >= 0.0005).slice(0, 5)
        .map(([w, k]) => `${key[k]} (${k + 1}) ${w.toFixed(3)}`);
      const pair = j >= 0 ? ` Here: ${key[j]} (${j + 1}) ${chosen.weight(i, j).toFixed(3)}.` : "";
      readout.textContent = active
        ? `${query[i]} (${i + 1}) attends to ${told.join(", ") || "nothing"}.${pair}`
        : `Layer ${layerName(map, layer)}, head ${head + 1}: entropy ${nats(chosen.entropy)}.`;
    };
    const element = make(
      "div", { class: "panel" }, make("h4", {}, data.labels[id]), heads,
      make("div", { class: "views" },
        make("div", { class: "between" }, left, lines, right),
        make("div", { class: "map" }, make("div", { class: "frame" }, heat, mark),
          make("p", { class: "soft" }, "rows: queries, columns: keys"))),
      readout);
    return { element, map, paint, point };
  }

  async view(id, largest) {
    const map = this.map(id), all = await levels(map);
    if (!map.grid) return this.textView(id, map, all, largest);
    const flow = map.rollout && { ...map.rollout, shape: [1, 1, ...map.shape.slice(2)], entropy: [[0]] };
    const rollout = flow ? headOf(flow, await levels(flow), 0, 0) : null;
    return pictureView(this, id, map, all, rollout);
  }

  // Points at query i of the first cell, in all of them, and at key j; −1 for none.
  point(i, j) {
    const [{ map: first }] = this.views;
    const own = map => sameToken(this.data, first.query, map.query, i);
    const ofPictures = this.views.filter(({ strongest }) => strongest);
    const largest = Math.max(...ofPictures.map(({ map, strongest }) => strongest(own(map))));
    for (const { map, point } of this.views) point(own(map), j, largest);
    this.pointStrip?.(own);
  }

  // Lines from queries to keys, of all queries or of one.
  lines(canvas, left, right, head, largest, only) {
    const rows = Math.max(left.children.length, right.children.length);
    const height = left.children[0].offsetHeight;
    [canvas.width, canvas.height] = [110, Math.max(1, rows * height)];
    const context = canvas.getContext("2d");
    context.strokeStyle = getComputedStyle(canvas).color;
    context.lineWidth = 1.5;
    for (let i = 0; i < head.T; i++) {
      if (only >= 0 && i !== only) continue;
      for (let j = 0; j < head.S; j++) {
        const share = head.weight(i, j) / largest;
        if (share < (only >= 0 ? 0.002 : 0.05)) continue;
        context.globalAlpha = only >= 0 ? Math.sqrt(share) : share;
        context.beginPath();
        context.moveTo(0, (i + 0.5) * height);
        context.lineTo(canvas.width, (j + 0.5) * height);
        context.stroke();
      }
    }
  }

  // The chosen head of every cell, small.
  async all(turn) {
    const { state } = this, items = [];
    for (const id of this.cells) {
      const map = this.map(id);
      if (!map || !(state.head < map.entropy[state.layer]?.length)) continue;
      const one = headOf(map, await levels(map), state.layer, state.head);
      const drawing = map.grid ? overlay(this.data, map) : make("canvas", { "aria-hidden": true });
      const label = this.data.labels[id], name = `${label}, entropy ${nats(one.entropy)}`;
      const button = make(
        "button",
        { type: "button", title: name, "aria-label": name,
          "aria-pressed": id === state.cell || id === state.other },
        drawing, make("span", {}, label), make("span", {}, digits(one.entropy)));
      button.onclick = () => this.set({ other: id });
      items.push([button, drawing, one, map]);
    }
    if (turn !== this.turn) return;
    this.strips.hidden = items.length < 2;
    this.strip.replaceChildren(...items.map(([button]) => button));
    const ofPictures = items.filter(([, , , map]) => map.grid);
    const ofTexts = items.filter(([, , , map]) => !map.grid);
    const largest = Math.max(...ofTexts.map(([, , one]) => one.largest));
    for (const [, canvas, one] of ofTexts) draw(canvas, one, 1, largest);
    this.pointStrip = own => {
      const rows = ofPictures.map(([, , one, map]) => rowOf(map, one, own(map)));
      const strongest = Math.max(...rows.map((row, k) => unitOf(ofPictures[k][3], row)));
      rows.forEach((row, k) => lay(ofPictures[k][1], ofPictures[k][3], row, strongest));
    };
    this.point(this.query);
  }
}

for (const place of document.querySelectorAll(".explorer")) {
  try {
    const explorer = new Explorer(place);
    // The colours of the page have changed.
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => explorer.show());
  } catch (error) {
    place.textContent = `These maps cannot be shown: ${error.message}`;
  }
}
