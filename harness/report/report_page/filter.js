// Choices above a table leave the lines that match all of them; without this all lines are shown.
for (const form of document.querySelectorAll("form.filters")) {
  const lines = [...document.getElementById(form.dataset.table).tBodies[0].rows];
  const choices = [...form.querySelectorAll("select")];
  const show = () => {
    for (const line of lines) {
      line.hidden = choices.some(
        (choice) => choice.selectedIndex > 0 && line.dataset[choice.name] !== choice.value
      );
    }
    const number = lines.filter((line) => !line.hidden).length;
    form.querySelector("output").textContent = `${number} of ${lines.length} cells`;
  };
  form.hidden = false;
  form.addEventListener("change", show);
  form.addEventListener("reset", () => setTimeout(show));
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}
