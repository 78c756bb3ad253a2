// The page's frame: heading, text, settings, and one view at a time.

import { STRINGS } from "./strings.js";
import { App } from "./app.js";
import { create } from "./dom.js";
import { MAX_TEXT, Panel } from "./panel.js";
import { PageError } from "./data.js";
import { parseLink } from "./state.js";
import { createNextView } from "./views/next.js";
import { createSurpriseView } from "./views/surprise.js";
import { createTrainingView } from "./views/training.js";
import { createAttentionView } from "./views/attention.js";
import { createLensView } from "./views/lens.js";
import { createCompareView } from "./views/compare.js";
import { createMachineView } from "./views/machine.js";
import { createMemorizationView } from "./views/memorization.js";
import { createCardView } from "./views/card.js";

const VIEWS = {
  next: createNextView,
  surprise: createSurpriseView,
  training: createTrainingView,
  attention: createAttentionView,
  lens: createLensView,
  compare: createCompareView,
  machine: createMachineView,
  memorization: createMemorizationView,
  card: createCardView,
};
const FIRST_TEXT = 160; // characters of the card's sample that the page opens with
const ADDRESS_DELAY = 250; // milliseconds without a change before the address is updated
const TYPING_DELAY = 120; // milliseconds without a key before a typed text is computed

/** Shows the frame and the current view, and keeps them up to date with the state. */
class Frame {
  constructor(app) {
    this.app = app;
    this.views = new Map(); // by name, created when they are opened first
    this.current = null; // the view on display
    this.currentName = "";
    this.updating = new AbortController(); // of the current view
    const { model, state } = app;
    const { unit } = model.tokenizer;
    this.status = create("p.error", { role: "alert", hidden: true });
    this.badge = this.createBadge();
    this.panel = new Panel(app, {
      undo: () => app.undo(),
      copy: () => this.copyLink(),
      reset: () => this.reset(),
    });
    this.main = create("main");
    this.links = new Map(
      Object.keys(VIEWS).map((name, index) => [name, this.createLink(name, index)]),
    );
    const links = [...this.links.values()].map((link) => create("li", link));
    document
      .getElementById("page")
      .replaceChildren(
        create(
          "header",
          create("h1", model.name),
          create("p.quiet", STRINGS.page.shape(model.parameters, model.config, unit)),
          create("p", STRINGS.page.lead(unit)),
        ),
        create("nav", { ariaLabel: STRINGS.page.views }, create("ol", links)),
        this.badge,
        create("div.frame", this.panel.element, create("div", this.status, this.main)),
      );
    state.listeners.push((names) => this.show(names));
    app.onError = (error) => this.showError(error);
    addEventListener("hashchange", () => this.followLink());
  }

  createLink(name, index) {
    const onclick = (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab or window
      event.preventDefault();
      this.app.state.set({ view: name });
    };
    const number = create("span.number", { ariaHidden: "true" }, index + 1);
    return create("a", { onclick }, number, STRINGS[name].name);
  }

  /** Create the line that names the checkpoint, if it is not the exported one. */
  createBadge() {
    const reset = () => this.app.setSampling({ checkpoint: -1 });
    this.badgeText = create("span");
    const button = create("button", { type: "button", onclick: reset }, STRINGS.page.exported);
    return create("p.note", { role: "status", hidden: true }, this.badgeText, " ", button);
  }

  /** Show what the page's address says. */
  followLink() {
    const { app } = this;
    const { state, model } = app;
    const given = new URLSearchParams(location.hash.slice(1));
    const values = parseLink(given);
    if (!given.has("text")) {
      const ids = model.tokenizer.encode(model.card.sample);
      values.text = cutAtLine(model.tokenizer.decode(ids).trimStart(), FIRST_TEXT);
    }
    this.panel.opening = given.has("text") ? null : values.text;
    values.text = values.text.slice(0, MAX_TEXT);
    // The tokens of a generated text are not always those that its text is encoded to.
    if (model.tokenizer.unit !== "character" || values.from > values.text.length) values.from = -1;
    if (!this.links.has(values.view)) values.view = "next";
    app.generation.abort();
    Object.assign(state.values, values);
    this.show(new Set(Object.keys(values)), { isLink: true });
  }

  /** Show the state; `names` are those of its values that changed. */
  show(names, { isLink = false } = {}) {
    const { state } = this.app;
    this.panel.show(names);
    this.showBadge();
    // Not at once: browsers refuse many changes of the address in a short time.
    clearTimeout(this.addressTimer);
    this.addressTimer = setTimeout(() => this.updateAddress(), ADDRESS_DELAY);
    const name = state.get("view");
    for (const [each, link] of this.links) {
      if (each === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (!this.views.has(name)) this.views.set(name, VIEWS[name](this.app));
    const view = this.views.get(name);
    const isOpened = view !== this.current;
    if (isOpened) {
      if (!isLink) {
        // Back returns to the view before, and to the text that it has now.
        history.replaceState(null, "", `#${state.format({ view: this.currentName })}`);
        history.pushState(null, "", `#${state.format()}`);
      }
      this.current = view;
      this.currentName = name;
      this.main.replaceChildren(view.element);
      this.panel.showFor(view);
    }
    if (isOpened || view.depends.some((each) => names.has(each))) {
      const isTyping = document.activeElement === this.panel.textarea;
      this.update(isTyping ? TYPING_DELAY : 0);
    }
  }

  /** Update the current view with the state, and cancel an update that is under way. */
  update(delay) {
    this.updating.abort();
    clearTimeout(this.updateTimer);
    const { signal } = (this.updating = new AbortController());
    this.updateTimer = setTimeout(async () => {
      this.main.setAttribute("aria-busy", "true");
      try {
        await this.current.update(signal);
        if (!signal.aborted) this.status.hidden = true;
      } catch (error) {
        if (!signal.aborted) this.showError(error);
      }
      if (!signal.aborted) this.main.removeAttribute("aria-busy");
    }, delay);
  }

  showBadge() {
    const { model, state } = this.app;
    const index = model.getCheckpoint(state.get("checkpoint"));
    this.badge.hidden = index === model.shown || state.get("view") === "training"; // which says it
    this.badgeText.textContent = STRINGS.page.checkpoint(model.checkpoints[index].step);
  }

  updateAddress() {
    const { state } = this.app;
    history.replaceState(null, "", `#${state.format()}`);
    for (const [view, link] of this.links) link.href = `#${state.format({ view })}`;
  }

  showError(error) {
    const isDamaged = error instanceof PageError;
    this.status.textContent = isDamaged ? STRINGS.page.damaged : STRINGS.page.failed(error.message);
    this.status.hidden = false;
  }

  async copyLink() {
    this.updateAddress();
    const { message } = this.panel;
    try {
      await navigator.clipboard.writeText(location.href);
      message.textContent = STRINGS.page.copied;
    } catch {
      message.textContent = STRINGS.page.notCopied;
    }
  }

  reset() {
    this.app.remember();
    history.replaceState(null, "", location.pathname);
    this.followLink();
  }
}

/** Return the beginning of a text, up to the end of a line if possible. */
function cutAtLine(text, limit) {
  const start = text.slice(0, limit);
  return start.slice(0, start.lastIndexOf("\n") + 1 || limit);
}

/** Build the page. Returns the app, or null if the file is damaged. */
function openPage() {
  try {
    const app = new App();
    new Frame(app).followLink();
    return app;
  } catch (error) {
    if (!(error instanceof PageError)) throw error;
    const message = create("p.error", { role: "alert" }, STRINGS.page.damaged);
    document.getElementById("page").replaceChildren(create("main", message));
    return null;
  }
}

let app = null; // also for programs that drive the page

document.addEventListener("DOMContentLoaded", () => {
  app = openPage(); // the data comes after this script
});
