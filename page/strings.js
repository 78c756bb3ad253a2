// Every text that the page shows, in one table. A function stands for a text with values.

const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (share) =>
  share >= 0.9995 ? "100 %" : share < 0.0005 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`;
const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

export const STRINGS = {
  number,
  percent,
  plural,
  bytes: (bytes) => `${number(bytes / 1e6, 2)} MB`,
  bits: (bits) => `${number(bits, 2)} bits`,

  page: {
    lead: (model, unit) =>
      `A small language model, whole, in this page. Given a text, it computes how likely each ${unit} is to come next: ` +
      "nothing else. Nothing you type leaves this page.",
    shape: (parameters, { n_layer, n_head, n_embd, block_size }, unit) =>
      `${plural(parameters, "parameter")} · ${plural(n_layer, "layer")} · ${plural(n_head, "head")} · ` +
      `${n_embd} channels · sees the last ${plural(block_size, unit)}`,
    views: "Views",
    text: "Text",
    textHint: (unit) =>
      `The views are about this text. Change it: the model continues it ${unit} by ${unit}.`,
    unknown: (chars) => `Left out, as the model never saw these characters: ${chars}`,
    empty: (prompt) => `The text is empty: the model starts from ${prompt}.`,
    tooLong: (limit) => `Only the first ${number(limit)} characters are used.`,
    notInLink: "This text is too long to be part of a link.",
    reset: "Reset everything",
    copy: "Copy link",
    copied: "Copied.",
    notCopied: "Copy the address of this page from your browser.",
    noWorker: "This browser runs the model on the page's own thread: the page may stutter.",
    damaged:
      "This file is incomplete: the model's weights are cut off or damaged. Copy or download the whole file again.",
    failed: (reason) => `This did not work: ${reason}`,
    loading: "Computing …",
  },

  settings: {
    name: "Sampling",
    seed: "Seed",
    seedHint: "Fixes the random draws: the same seed gives the same text.",
    count: (unit) => `Length (${unit}s)`,
    temperature: "Temperature",
    temperatureHint:
      "Divides the logits. Below 1: safer; above 1: wilder; 0: always the likeliest.",
    topK: "Top-k",
    topKHint: "Only the k likeliest may be drawn.",
    topP: "Top-p",
    topPHint: "Only the likeliest that have this probability together.",
    minP: "Min-p",
    minPHint: "Only those at least this share as likely as the likeliest.",
    all: "all",
    none: "off",
  },

  token: {
    names: { " ": "space", "\n": "new line", "\t": "tab", "\r": "carriage return" },
    position: (index) => `position ${number(index + 1)}`,
  },

  next: {
    name: "Next",
    title: (unit) => `What comes next? One bar for each ${unit}`,
    lead: (unit) =>
      `The outlined bar is what the model computed. The filled bar is what is left after temperature, top-k, top-p ` +
      `and min-p: a ${unit} is drawn from these. What is cut is grey. Click a bar to append it.`,
    step: "Step",
    run: "Run",
    stop: "Stop",
    undo: "Undo",
    bar: (name, before, after) =>
      after === null
        ? `${name}: ${before}, cut`
        : `${name}: ${before}, after sampling settings ${after}`,
    append: (name) => `Append ${name}`,
    before: "model",
    after: "drawn from",
    entropy: (bits, choices) =>
      `Uncertainty: ${number(bits, 2)} bits, as much as ${number(choices, 1)} equally likely choices.`,
    left: (kept, all) => `${number(kept)} of ${number(all)} may be drawn.`,
    more: (count) => `${number(count)} less likely ones are not shown.`,
    rate: (count, unit, seconds) =>
      `${plural(count, unit)} in ${number(seconds, 1)} s: ${number(count / seconds)} a second.`,
    command: (dtype) =>
      `On the command line, ${dtype === "fp32" ? "the same text" : `the same text, but for this page's weights being rounded to ${dtype}`}:`,
  },

  surprise: {
    name: "Surprise",
    title: "How surprised is the model?",
    lead: (unit) =>
      `Each ${unit} has the colour of its surprise, −log₂ of the probability that the model gave it: 0 bits if it was certain, ` +
      "1 bit for each halving. Hover, or use the arrow keys. A click on one of the five likeliest goes on from there.",
    mean: (bits, count, unit) => `${number(bits, 3)} bits a ${unit} over ${plural(count, unit)}`,
    perByte: (bits) => `${number(bits, 3)} bits per byte`,
    worse: (vocabulary) => `Guessing would take ${number(Math.log2(vocabulary), 2)} bits.`,
    choose: "Choose a place in the text to see what the model expected there.",
    short: (unit) => `Write at least two ${unit}s.`,
    detail: (name, place) => `${name} at ${place}`,
    facts: (probability, bits, rank) =>
      `probability ${probability}, ${number(bits, 2)} bits, rank ${number(rank)}`,
    first: "The first has no prediction: there is nothing before it.",
    top: "The five likeliest here:",
    branch: (name) => `Go on with ${name} from here`,
    chart: "Mean surprise so far",
    position: "position",
    unit: "bits",
    legend: "0 to 8 bits and more",
  },

  training: {
    name: "Training",
    title: "The same prompt, at different times of training",
    lead: "Move through the checkpoints of the run. The prompt is your text; seed and sampling stay the same.",
    slider: "Checkpoint",
    kinds: { initial: "before training", checkpoint: "", best: "best", last: "last" },
    step: (step, kind) => `step ${number(step)}${kind && ` (${kind})`}`,
    losses: (train, val) =>
      [
        train === null ? null : `train loss ${number(train, 3)}`,
        val === null ? null : `val loss ${number(val, 3)}`,
      ]
        .filter(Boolean)
        .join(", "),
    text: (bits, unit) => `Your text: ${number(bits, 3)} bits a ${unit}.`,
    one: "This page has one checkpoint. To pack more, keep some while training, and export them:",
    commands: "python train.py --keep-every 100\npython export.py --format html --checkpoints 8",
    overfitting: (since, rise) =>
      `Overfitting: after step ${number(since)} the validation loss rose by ${number(rise, 3)}, while the model learned its text by heart.`,
    chart: "Loss by step",
    train: "train",
    val: "val",
    xLabel: "step",
    yLabel: "loss (nats)",
    noCurve: "The record of the run's losses was not there when the page was made.",
    sample: "Continuation",
    used: "All views show the model of this checkpoint, until you move the slider back.",
  },

  attention: {
    name: "Attention",
    title: "Where does each head look?",
    lead: (unit) =>
      `One map for each head: a row is a ${unit}, a column one before it; dark is much attention. Choose a head, then a ${unit}: ` +
      "its colours show where that head looks from there.",
    cut: (count, unit) =>
      `Shown for the last ${plural(count, unit)} of the text, all that the model sees.`,
    layer: (layer) => `Layer ${layer + 1}`,
    head: (layer, head) => `Layer ${layer + 1}, head ${head + 1}`,
    scores: (previous, induction) => `prev ${percent(previous)}\nind ${percent(induction)}`,
    scoresLong:
      "prev: attention to the token before. ind (induction): attention to what followed the same token earlier. Both are means over a random text that is repeated.",
    on: "on",
    switchOff: (name) => `${name}: on`,
    loss: (bits, unit) => `Surprise of the text with all heads: ${number(bits, 3)} bits a ${unit}.`,
    lossOff: (bits, off, change) =>
      `With ${plural(off, "head")} off: ${number(bits, 3)} (${change >= 0 ? "+" : "−"}${number(Math.abs(change), 3)}).`,
    allOn: "Switch all on",
    reads: (name, targets) => `From ${name} this head looks at: ${targets}`,
    map: (name) => `Attention map of ${name}`,
  },

  lens: {
    name: "Layers",
    title: "What would each layer say?",
    lead:
      "The logit lens: the LM head, applied after each layer. A column is a place in the text, and the rows from top to bottom are the " +
      "layers. The darker, the surer. The last row is the model's prediction for what comes next.",
    embedding: "Embedding",
    layer: (layer) => `After layer ${layer}`,
    text: "Text",
    cut: (count, unit) => `Shown for the last ${plural(count, unit)} of the text.`,
    cell: (row, name, top) => `${row}, after ${name}: ${top}`,
    choose: "Choose a cell to see its five likeliest.",
    caption: "Likeliest next token by layer and position",
  },

  compare: {
    name: "Compare",
    title: "Two models, side by side",
    lead: "The same prompt and the same seed. Any difference comes from the weights.",
    drop: "Drop another page of Folio here, or choose one:",
    file: "Another page (.html)",
    notAPage: "This file is not a page of Folio, or it is incomplete.",
    itself: "There is one model in this page so far.",
    pack: "Or pack two models into one page, as a parent and its fine-tuned child:",
    command: "python export.py dante_purgatorio --format html --with dante_base",
    text: (bits) => `your text: ${number(bits, 3)} bits per byte`,
    unknown: (chars) => `does not know ${chars}`,
    second: "Second model",
    same: (count, unit) => `The continuations are equal for the first ${plural(count, unit)}.`,
  },

  machine: {
    name: "Machine",
    title: "The machine, part by part",
    lead: "Every part with its true shape and number of parameters, and the lines of model.py that compute it.",
    lines: (start, end) => `model.py, lines ${start} to ${end}`,
    times: (count) => `× ${count}`,
    parameters: (count, share) =>
      count === 0 ? "no parameters" : `${plural(count, "parameter")} (${percent(share)})`,
    total: (count, bytes) => `${plural(count, "parameter")} in all: ${bytes} in this page.`,
    parts: {
      tokens: ["Tokens", "The text, as numbers: one id for each entry of the vocabulary."],
      embedding: ["Token embedding", "Looks up a vector for each token."],
      positions: ["Position embedding", "Adds a vector for each position."],
      norm: ["Norm", "Scales each vector to a fixed size."],
      attention: [
        "Attention",
        "Each head lets a position read from those before it: queries, keys and values, then a projection.",
      ],
      rotary: [
        "Query-key norm, rotary positions",
        "Normalizes queries and keys, and turns them by an angle that grows with the position.",
      ],
      mlp: [
        "MLP",
        "Transforms each position on its own: up to a larger width, activation, and down.",
      ],
      gated: [
        "Gated MLP",
        "Transforms each position on its own: an up projection times an activated gate, and down.",
      ],
      finalNorm: ["Final norm", "The same, before the head."],
      head: ["LM head", "A logit for each token of the vocabulary."],
      tied: [
        "LM head (tied)",
        "The token embedding again: a logit for each token of the vocabulary.",
      ],
      softmax: ["Softmax", "Turns logits into probabilities."],
    },
    add: "adds its output to the residual stream",
    layer: "Block",
  },

  memorization: {
    name: "Memory",
    title: "What is copied from the training text?",
    lead: ({ length, surely }) =>
      `Underlined stretches stand, character by character, in the training text. Any stretch of ${surely} characters and more is found; ` +
      `from ${length} characters on, some are.`,
    how: ({ count, characters }) =>
      `The page does not hold the text: it holds ${number(count)} hashes of short stretches of its ${number(characters)} characters. ` +
      "By chance, about one place in 25,000 is underlined wrongly.",
    found: (count, longest, share) =>
      count === 0
        ? "No stretch of this text was found in the training text."
        : `${count === 1 ? "1 stretch" : `${number(count)} stretches`} found, the longest has at least ${plural(longest, "character")}: ${percent(share)} of the text.`,
    none: (reason) => `The page was made without this: ${reason}.`,
    generate: (count, unit) => `Generate ${plural(count, unit)} more`,
  },

  card: {
    name: "Card",
    title: "How this model was made",
    facts: "Facts",
    settings: "Settings that are not the defaults",
    sample: "A sample",
    limits: "Limits",
    limitTexts: (unit, block) => [
      `It knows one text and nothing else: it has no facts, no instructions, no safety training. What it writes imitates that text.`,
      `It sees at most ${plural(block, unit)}: in a longer text, it forgets the beginning.`,
      "Its text may contain stretches of the training text, and whatever is offensive in it.",
    ],
    setting: "Setting",
    value: "Value",
  },
};
