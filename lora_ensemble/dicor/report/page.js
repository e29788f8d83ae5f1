// What the still pictures cannot do: tell of a mark where the pointer is, and ring the members that are ticked.
const still = JSON.parse(document.getElementById("specifications").textContent);
const options = {
  mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false, // ast: no text becomes a program
  tooltip: { disableDefaultStyle: true },
};
const ticked = new Set();
const views = [];

function show() {
  for (const view of views) view.signal("ticked", [...ticked]).runAsync();
}

function tick(box) {
  if (box.checked) ticked.add(Number(box.value));
  else ticked.delete(Number(box.value));
  for (const other of document.querySelectorAll(`input[value="${box.value}"]`)) {
    other.checked = box.checked;
    other.closest("tr").classList.toggle("ticked", box.checked);
  }
  show();
}

for (const row of document.querySelectorAll("tr[data-member]")) {
  const [head] = row.cells;
  const [box, label] = ["input", "label"].map((name) => document.createElement(name));
  Object.assign(box, { type: "checkbox", value: row.dataset.member, checked: false, autocomplete: "off" });
  box.addEventListener("change", () => tick(box));
  label.append(box, ...head.childNodes);
  head.append(label);
}
document.body.classList.add("alive");

for (const [name, specification] of Object.entries(still)) {
  const picture = document.querySelector(`#figure-${name} .still`);
  const live = picture.cloneNode(false);
  live.className = "live";
  picture.after(live);
  const { view } = await vegaEmbed(live, specification, options);
  live.firstElementChild.ariaHidden = "true"; // the picture has a name, and its numbers are in tables
  picture.parentElement.classList.add("alive");
  views.push(view);
}
show();
