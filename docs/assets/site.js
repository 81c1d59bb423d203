// Two repairs of what the theme does in the browser, for people who do not use a mouse.

// Code that scrolls must be able to have the focus; the theme takes that away where there is a touch screen.
const scrolling = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.scrollWidth > target.clientWidth) target.tabIndex = 0
})

document$.subscribe(() => {
  document.querySelectorAll("pre > code").forEach((code) => scrolling.observe(code))
  // Each copy button sits in a <nav> without a name. A dozen places to go to, says a screen reader; they are none.
  document.querySelectorAll(".md-code__nav").forEach((nav) => nav.setAttribute("role", "none"))
})
