"use strict";

// Colours and fonts in the figures are names of the style sheet: plots follow light and dark as the page does.
function draw() {
  const style = getComputedStyle(document.documentElement);
  const figures = JSON.parse(document.getElementById("figures").textContent, (key, value) =>
    typeof value === "string" && /^var\(--[a-z-]+\)$/.test(value) ? style.getPropertyValue(value.slice(4, -1)).trim() : value
  );
  for (const [id, figure] of Object.entries(figures)) {
    Plotly.react(id, figure.data, figure.layout, { displayModeBar: false, responsive: true });
  }
}

const scheme = document.documentElement.dataset;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("beforeprint", () => { scheme.print = ""; draw(); });
addEventListener("afterprint", () => { delete scheme.print; draw(); });
draw();

// Sorting: a click, or Enter or Space on the heading's button; the same again turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      const rows = [...table.tBodies[0].rows];
      const keys = new Map(rows.map((row) => [row, row.cells[column].dataset.key]));
      const numeric = [...keys.values()].every((key) => key === "inf" || key === "-inf" || (key !== "" && !isNaN(key)));
      const number = (key) => (key === "inf" ? Infinity : key === "-inf" ? -Infinity : Number(key));
      rows.sort((one, other) => {
        const [a, b] = [keys.get(one), keys.get(other)];
        const order = numeric ? (number(a) === number(b) ? 0 : number(a) - number(b)) : a.localeCompare(b);
        return descending ? -order : order;
      });
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      table.tBodies[0].append(...rows);
      const words = `Sorted by ${heading.textContent.trim()}, ${descending ? "descending" : "ascending"}.`;
      document.getElementById("sorted").textContent = words;
    });
  });
}
