"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const key = (cell) => {
    const text = (cell.dataset.value ?? cell.firstChild?.textContent ?? cell.textContent).replace(/[\s,]/g, "").replace("−", "-");
    const number = text.match(/^(eps)?≥?([+-]?(\d+\.?\d*(e[+-]?\d+)?|∞))/);
    return number ? (number[2].includes("∞") ? Infinity : parseFloat(number[2])) : cell.textContent.trim();
  };
  const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row, place) => [key(row.cells[column]), place, row]);
      rows.sort((a, b) => (up ? order(a[0], b[0]) : order(b[0], a[0])) || a[1] - b[1]);
      body.append(...rows.map((row) => row[2]));
    });
  });
}
