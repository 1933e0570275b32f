for (const button of document.querySelectorAll("th button")) {
  button.onclick = () => {
    const head = button.parentNode, body = head.closest("table").tBodies[0];
    const order = head.ariaSort === "ascending" ? "descending" : "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const key = row => row.cells[head.cellIndex].dataset.sort ?? row.cells[head.cellIndex].textContent;
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
