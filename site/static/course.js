// the theme's arrows in the table of contents have no name for screen readers
document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("summary:not([aria-label])").forEach(
  (e) => { if (!e.textContent.trim()) e.setAttribute("aria-label", "show the pages below"); }));
// the film on the first page runs by itself, unless the reader has asked for less motion
document.addEventListener("DOMContentLoaded", () => {
  if (matchMedia("(prefers-reduced-motion: no-preference)").matches) document.querySelector("#film button")?.click(); });
