// Of the page of an explanation: zoom, jump to a block, filter its lines.
"use strict";
for (const zoom of document.querySelectorAll(".zoom")) {
  const wide = document.getElementById(zoom.dataset.of);
  zoom.addEventListener("input", () => { wide.style.width = 100 * zoom.value + "%"; });
}
for (const rect of document.querySelectorAll(".map [data-block]")) {
  rect.addEventListener("click", () => {
    const block = document.getElementById(rect.dataset.block);
    block.open = true;
    block.scrollIntoView();
  });
}
for (const section of document.querySelectorAll("section")) {
  const code = section.querySelector(".code"), views = section.querySelector(".views");
  const find = section.querySelector(".find");
  if (!code) continue;
  views.addEventListener("change", () => code.classList.toggle("show-views", views.checked));
  find.addEventListener("input", () => {
    const wanted = find.value.toLowerCase();
    for (const row of code.querySelectorAll("tr")) {
      row.classList.toggle("hide", wanted !== "" && !row.textContent.toLowerCase().includes(wanted));
    }
  });
}
