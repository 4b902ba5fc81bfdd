// What the renderer's own script leaves to the keyboard: the sidebar of a narrow screen, boxes that scroll, the colour switch.
(() => {
  const all = sel => Array.from(document.querySelectorAll(sel)), one = sel => document.querySelector(sel);

  // The sidebar behind its button: say whether it is open, go into it, and come back with Escape
  const button = one('.quarto-btn-toggle'), sidebar = one('#quarto-sidebar');
  if (button && sidebar) {
    const tell = () => button.setAttribute('aria-expanded', sidebar.classList.contains('show'));
    new MutationObserver(tell).observe(sidebar, {attributes: true, attributeFilter: ['class']});
    tell();
    button.addEventListener('click', () => { if (sidebar.classList.contains('show')) (sidebar.querySelector('.active') || sidebar.querySelector('a')).focus({preventScroll: true}); });
    document.addEventListener('keydown', ev => { if (ev.key === 'Escape' && sidebar.classList.contains('show')) { button.click(); button.focus(); } });
  }

  // A box that scrolls sideways is reached by the Tab key, and only while it scrolls
  const boxes = all('main pre, main .sd-table, main .cell-output-display, main .math.display');
  const reach = () => boxes.forEach(o => { if (o.scrollWidth > o.clientWidth + 1 && getComputedStyle(o).overflowX !== 'visible') o.tabIndex = 0; else o.removeAttribute('tabindex'); });
  reach();
  addEventListener('load', reach);
  addEventListener('resize', reach);

  // The switch tells which of its two states it is in
  const root = document.documentElement, tell = () => all('.quarto-color-scheme-toggle').forEach(o => o.setAttribute('aria-pressed', root.dataset.scheme === 'alternate'));
  new MutationObserver(tell).observe(root, {attributes: true, attributeFilter: ['data-scheme']});
  tell();
})();
