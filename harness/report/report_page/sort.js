// Headings become buttons that sort; without this the table stays as it was written.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const falling = heading.ariaSort === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const body = table.tBodies[0];
      const value = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
      const compare = (a, b) => {
        // What is unknown stands last in either direction.
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = a.localeCompare(b, "en", { numeric: false });
        const difference = isNaN(a) || isNaN(b) ? order : a - b;
        return falling ? -difference : difference;
      };
      body.append(...[...body.rows].sort((one, two) => compare(value(one), value(two))));
    });
  });
}
