// A click on an agent in the legend shows it alone in all figures; more clicks show more.
const shown = new Set();
const buttons = document.querySelectorAll(".legend button");
for (const button of buttons) {
  button.addEventListener("click", () => {
    const name = button.dataset.label;
    if (!shown.delete(name)) shown.add(name);
    for (const other of buttons) other.setAttribute("aria-pressed", String(shown.has(other.dataset.label)));
    for (const part of document.querySelectorAll("[class^='label-']")) {
      part.classList.toggle("dim", shown.size > 0 && !shown.has(part.classList[0]));
    }
  });
}
