// Material puts each copy button into a <nav> without a name. A screen reader would list a dozen of them as places to
// go to; to be a place is not what a button is for.
document$.subscribe(() => {
  document.querySelectorAll(".md-code__nav").forEach((nav) => nav.setAttribute("role", "none"))
})
