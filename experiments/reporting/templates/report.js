"use strict";
// Makes an element: attributes by name, children are elements or text.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function choice(label, options, chosen, change) {
  const select = make("select", {});
  for (const [value, text] of options) select.append(make("option", { value }, text));
  select.value = chosen;
  select.onchange = () => change(select.value);
  return make("label", {}, `${label} `, select);
}

// A table shows the rows that have all words of its filter.
for (const input of document.querySelectorAll("[data-filter]")) {
  const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows];
  const output = input.closest("p").querySelector("output");
  input.oninput = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const own = row.dataset.words.toLowerCase();
      row.hidden = !words.every(word => own.includes(word));
    }
    const shown = rows.filter(row => !row.hidden).length;
    output.textContent = words.length ? `${shown} of ${rows.length} cells` : "";
  };
}

// The names in a legend are switches of their curves.
for (const label of document.querySelectorAll(".curves [id^='label|']")) {
  const rest = label.id.slice("label|".length);
  const part = kind => document.getElementById(`${kind}|${rest}`);
  const attributes = { role: "switch", tabindex: 0, "aria-checked": true };
  attributes["aria-label"] = label.textContent.trim();
  for (const [name, value] of Object.entries(attributes)) label.setAttribute(name, value);
  const toggle = () => {
    const on = label.getAttribute("aria-checked") === "false";
    label.setAttribute("aria-checked", on);
    for (const kind of ["line", "band"]) part(kind)?.classList.toggle("off", !on);
    for (const kind of ["handle", "label"]) part(kind)?.classList.toggle("dim", !on);
  };
  label.onclick = toggle;
  label.onkeydown = event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    toggle();
  };
}

// A dot of cost against quality tells its cell.
for (const dot of document.querySelectorAll("[id^='cost|']")) {
  const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
  title.textContent = dot.id.split("|")[1];
  dot.prepend(title);
}

// The settings in which two cells differ.
for (const place of document.querySelectorAll(".settings")) {
  const cells = JSON.parse(document.getElementById("configs").textContent);
  const byId = new Map(cells.map(cell => [cell.id, cell]));
  const whole = id => {
    const { base, settings, gone = [] } = byId.get(id);
    const found = { ...(base ? byId.get(base).settings : {}), ...settings };
    for (const name of gone) delete found[name];
    return found;
  };
  const chosen = [cells[0].id, (cells[1] ?? cells[0]).id];
  const options = cells.map(({ id }) => [id, id]);
  const table = make("table", { class: "settings-table" });
  const show = () => {
    const [a, b] = chosen.map(whole);
    const names = [...new Set([...Object.keys(a), ...Object.keys(b)])].sort();
    const differing = names.filter(name => a[name] !== b[name]);
    const row = (tag, ...texts) => make("tr", {}, ...texts.map(text => make(tag, {}, text ?? "—")));
    const body = differing.map(name => row("td", name, a[name], b[name]));
    if (!body.length) body.push(row("td", "no setting differs", "", ""));
    table.replaceChildren(
      make("thead", {}, row("th", "setting", ...chosen)), make("tbody", {}, ...body));
  };
  const selects = [0, 1].map(i =>
    choice(["this cell", "and this"][i], options, chosen[i], id => { chosen[i] = id; show(); }));
  place.replaceChildren(
    make("div", { class: "controls" }, ...selects), make("div", { class: "scroll" }, table));
  show();
}

// A live page loads itself anew when its server has a later version, and stays as it was set.
if (document.body.dataset.version) {
  const switches = () => [...document.querySelectorAll(".curves [role=switch]")];
  const kept = JSON.parse(sessionStorage.getItem("page") ?? "{}");
  for (const input of document.querySelectorAll("[data-filter]")) {
    input.value = kept.filters?.[input.dataset.filter] ?? "";
    input.oninput();
  }
  for (const [table, column, order] of kept.sorts ?? []) {
    const button = document.querySelectorAll("table")[table]?.querySelectorAll("th")[column]
      ?.querySelector("button");
    button?.click();
    if (order === "descending") button?.click();
  }
  for (const label of switches()) if (kept.off?.includes(label.id)) label.onclick();
  const keep = () => {
    const filters = {};
    for (const input of document.querySelectorAll("[data-filter]")) {
      filters[input.dataset.filter] = input.value;
    }
    const tables = [...document.querySelectorAll("table")];
    const sorts = tables.flatMap((table, i) => [...table.querySelectorAll("th[aria-sort]")].map(
      head => [i, head.cellIndex, head.ariaSort]));
    const off = switches().filter(label => label.getAttribute("aria-checked") === "false");
    const state = { filters, sorts, off: off.map(label => label.id) };
    sessionStorage.setItem("page", JSON.stringify(state));
  };
  setInterval(async () => {
    try {
      const version = await (await fetch("/version")).text();
      const typing = document.activeElement?.matches("input, select");
      if (version === document.body.dataset.version || typing) return;
      const answer = await fetch("/");
      if (!answer.ok) return;
      keep();
      location.reload();
    } catch { /* the server is gone; what is shown stays */ }
  }, 3000);
}
