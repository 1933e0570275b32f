for (const button of document.querySelectorAll("th button")) {
  button.onclick = () => {
    const head = button.parentNode, body = head.closest("table").tBodies[0];
    const order = head.ariaSort === "ascending" ? "descending" : "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const text = cell => cell.dataset.sort ?? cell.textContent;
    // JavaScript does not read an infinite number as Python writes it.
    const key = row => text(row.cells[head.cellIndex]).replace(/^([+-]?)inf$/, "$1Infinity");
    const sign = order === "ascending" ? 1 : -1, empty = text => text === "" || text === "nan";
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (empty(x) || empty(y)) return empty(x) - empty(y);
      return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    });
    body.classList.add("sorted");
    body.append(...rows);
  };
}
