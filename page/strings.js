// Every text that the page shows, in one table. A function stands for a text with values.

const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (share) =>
  share >= 0.9995 ? "100 %" : share < 0.0005 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`;
const plural = (count, noun) =>
  `${number(count)} ${noun}${count === 1 ? "" : noun.endsWith("ch") ? "es" : "s"}`;
const toBits = (nats) => nats / Math.LN2;

export const STRINGS = {
  number,
  percent,
  bits: (bits) => `${number(bits, 2)} bits`,

  page: {
    lead: (unit) =>
      `A small language model, whole, in this file. Given a text, it computes how likely each ${unit} ` +
      "is to come next. Nothing you type is sent anywhere; it is only kept in the address of this page.",
    shape: (parameters, { n_layer, n_head, n_embd, block_size }, unit) =>
      `${plural(parameters, "parameter")} · ${plural(n_layer, "layer")} · ` +
      `${plural(n_head, "head")} · ${n_embd} channels · context of ${plural(block_size, unit)}`,
    views: "Views",
    text: "Text",
    opening: "A text that this model generated: replace it by your own.",
    unknown: (chars) => `Left out, as they are not in the vocabulary: ${chars}`,
    empty: (prompt) => `The text is empty: generation starts from ${prompt}`,
    tooLong: (limit) => `Only the first ${number(limit)} characters are used.`,
    notInLink: "This text is too long to be part of a link.",
    undo: "Undo",
    reset: "Reset",
    copy: "Copy link",
    copied: "Copied.",
    notCopied: "Copy the address of this page from your browser.",
    noWorker: "This browser runs the model on the page's own thread, so the page may stutter.",
    checkpoint: (step) => `All views show the model of step ${number(step)} of its training.`,
    exported: "Back to the exported model",
    damaged: "This file is incomplete or damaged. Copy or download the whole file again.",
    failed: (reason) => `This did not work: ${reason}`,
  },

  settings: {
    form: "Text and sampling",
    name: "Sampling",
    temperature: ["Temperature", "Below 1: safer; above 1: wilder; 0: always the likeliest"],
    top_k: ["Top-k", "Draw from the k likeliest only"],
    top_p: ["Top-p", "Draw from the likeliest that have this probability together"],
    min_p: ["Min-p", "Draw from those at least this share as likely as the likeliest"],
    seed: ["Seed", "The same seed gives the same text"],
    count: (unit) => [`Length in ${unit}s`, "How much is generated at once"],
    all: "all",
    none: "off",
  },

  token: {
    names: new Map([
      [" ", "space"],
      ["\n", "new line"],
      ["\t", "tab"],
      ["\r", "carriage return"],
    ]),
    position: (index) => `position ${number(index + 1)}`,
    cut: (count, unit) => `For the last ${plural(count, unit)} of the text.`,
  },

  next: {
    name: "Next",
    title: (unit) => `What comes next? One bar for each ${unit}`,
    lead: (unit) =>
      `The outlined bars are the model's probabilities. The filled bars are those after temperature, ` +
      `top-k, top-p and min-p, from which a ${unit} is drawn; a ${unit} that these cut is grey. Click a bar ` +
      "to append it.",
    step: "Step",
    run: "Run",
    stop: "Stop",
    slowly: "slowly",
    bar: (name, before, after) =>
      `${name}: ${before}, ${after === null ? "cut" : `drawn from ${after}`}`,
    append: (name) => `Append ${name}`,
    cut: "cut",
    before: "model",
    after: "after the settings",
    entropy: (before, after) =>
      `Uncertainty: ${number(before, 2)} bits, like ${number(2 ** before, 1)} equally likely choices; ` +
      `after the settings ${number(after, 2)} bits, like ${number(2 ** after, 1)}.`,
    left: (kept, all) => `${number(kept)} of ${number(all)} may be drawn.`,
    more: (count) => `${number(count)} less likely ones are not shown.`,
    rate: (count, unit, seconds) =>
      `Generated ${plural(count, unit)} in ${number(seconds, 1)} s: ${number(count / seconds)} a second.`,
    drawn: (name) => `Drawn: ${name}`,
    generated: "The text so far, its prompt in grey",
    command: "On the command line (there the weights are not rounded, so a long text may differ):",
    bundle: (run, step) =>
      `runs/${run}/artifacts/checkpoints/step_${String(step).padStart(8, "0")}`,
  },

  surprise: {
    name: "Surprise",
    title: "How surprising is each character?",
    titleOfTokens: "How surprising is each token?",
    lead: (unit) =>
      `Each ${unit} has the colour of its surprise: −log₂ of the probability that the model gave it. That is 0 bits if ` +
      "it was certain, and 1 bit more for each halving. Point at or tap one, or use the arrow keys, to see what was " +
      "expected; a click holds it.",
    mean: (bits, count, unit) =>
      `${number(bits, 3)} bits a ${unit} over ${plural(count, unit)} (all but the first)`,
    perByte: (bits) => `${number(bits, 3)} bits per byte`,
    guessing: (vocabulary) => `Guessing takes ${number(Math.log2(vocabulary), 2)} bits.`,
    passage: "The text, coloured by surprise",
    certain: "0 bits",
    surprised: "8 bits and more",
    choose: "Point at a place in the text.",
    short: (unit) => `Write at least two ${unit}s.`,
    detail: (name, place) => `${name} at ${place}`,
    facts: (probability, bits, rank) =>
      `Probability ${probability}, ${number(bits, 2)} bits, rank ${number(rank)}`,
    first: "The first has no prediction: there is nothing before it.",
    top: "The five likeliest; click one to end the text here with it:",
    branch: (name) => `End the text here with ${name}`,
    chart: "Mean surprise up to each position",
    position: "position",
    unit: "bits",
  },

  training: {
    name: "Training",
    title: "The same prompt at different steps of training",
    lead: "Move through the checkpoints of the run. The prompt is your text; seed and sampling stay the same.",
    slider: "Checkpoint",
    kinds: { initial: "before training", checkpoint: "", best: "best", last: "last" },
    step: (step, kind) => `step ${number(step)}${kind && ` (${kind})`}`,
    losses: (train, val, unit) => {
      const write = (name, loss) =>
        loss === null
          ? `${name} not evaluated at this step`
          : `${name} ${number(loss, 3)} nats, which are ${number(toBits(loss), 2)} bits a ${unit}`;
      return `${write("Train loss", train)}; ${write("val loss", val)}.`;
    },
    text: (bits, unit) => `Your text: ${number(bits, 3)} bits a ${unit}.`,
    one: "This page has one checkpoint. To pack more, save some in training, and export them:",
    commands: "python train.py --keep-every 100\npython export.py --format html --checkpoints 8",
    overfitting: (since, rise) =>
      `Overfitting: after step ${number(since)} the val loss rose by ${number(rise, 3)}, while the model ` +
      "memorized its training text.",
    chart: "Loss by step",
    train: "train",
    val: "val",
    xLabel: "step",
    yLabel: "loss (nats)",
    noCurve: "The losses of the run were not there when the page was made.",
    sample: "Continuation",
  },

  attention: {
    name: "Attention",
    title: "What does each head attend to?",
    lead: (unit) =>
      `One map for each head: a row is a ${unit}, and its columns are those that it attends to, the ${unit} itself ` +
      `included; dark is much. Choose a head, then a ${unit} of the text: the colours show what it attends to.`,
    layer: (layer) => `Layer ${layer}`,
    head: (layer, head) => `Layer ${layer}, head ${head}`,
    headShort: (head) => `head ${head}`,
    scores: (previous, induction) => `prev ${percent(previous)}\nind ${percent(induction)}`,
    scoresLong:
      "prev: mean attention to the token before. ind (induction): to the token that followed the same token " +
      "earlier. Both on random text that is repeated, not on yours. Without the tick, a head is switched off, " +
      "which changes the surprise above only.",
    loss: (bits, unit) => `Surprise with all heads: ${number(bits, 3)} bits a ${unit}.`,
    lossOff: (bits, off, change) =>
      `With ${plural(off, "head")} off: ${number(bits, 3)} (${change >= 0 ? "+" : "−"}${number(Math.abs(change), 3)}).`,
    allOn: "Switch all on",
    passage: "The text, coloured by attention",
    reads: (name, targets) => `From ${name}, this head attends to ${targets}`,
    map: (name) => `Attention map of ${name}`,
  },

  lens: {
    name: "Layers",
    title: "What does each layer predict?",
    lead:
      "The logit lens: what the model would predict if it ended after a layer. Each column is a place in the text. Above are " +
      "the character there and the true next one; below, the likeliest next one after each layer, the darker the " +
      "likelier. Underlined: right.",
    after: "Text",
    next: "True next",
    embedding: "Embedding",
    layer: (layer) => `After layer ${layer}`,
    cell: (row, name, top) => `${row}, at ${name}: ${top}`,
    choose: "Choose a cell to see the five likeliest.",
    caption: "Likeliest next token by layer and position",
  },

  compare: {
    name: "Compare",
    title: "Two models, side by side",
    lead: "The same prompt and the same seed: any difference comes from the weights.",
    second: "On the right",
    file: "Compare with the model of another page, a file of export.py --format html:",
    notAPage: "This file is no such page, or it is incomplete.",
    single: "There is nothing to compare with in this page so far.",
    pack: "Or make a page with two models, such as a parent and its fine-tuned child:",
    command: "python export.py dante_purgatorio --format html --with dante",
    text: (bits) => `Your text: ${number(bits, 3)} bits per byte`,
    same: (count) =>
      count === 0
        ? "The continuations differ from the first character on."
        : `The continuations have the first ${plural(count, "character")} in common.`,
  },

  machine: {
    name: "Machine",
    title: "The machine, part by part",
    lead: "Every part with its output shape, its number of parameters, and the lines of model.py that compute it.",
    lines: (start, end) => `model.py, lines ${start} to ${end}`,
    times: (count) => `× ${count}`,
    parameters: (count, share) =>
      count === 0 ? "no parameters" : `${plural(count, "parameter")} (${percent(share)})`,
    inBlocks: (count, blocks, share) =>
      `${plural(count, "parameter")}, in ${plural(blocks, "block")} ${number(count * blocks)} (${percent(share * blocks)})`,
    total: (count, megabytes) =>
      `${plural(count, "parameter")} in all; as a file, ${number(megabytes, 2)} MB of weights.`,
    legend: (T, C, H, D, V) =>
      `T context ${T}, C channels ${C}, H heads ${H}, D head size ${D}, V vocabulary ${V}. A shorter text has a smaller T.`,
    parts: {
      tokens: ["Tokens", "The text as numbers: an id for each entry of the vocabulary."],
      embedding: ["Token embedding", "Looks up a vector for each token."],
      ngrams: [
        "N-gram embedding",
        "Adds vectors for the last two, three and four tokens: R rows, which n-grams share.",
      ],
      positions: ["Position embedding", "Adds a vector for each position."],
      norm: ["Norm", "Scales each vector to a fixed size."],
      attention: [
        "Attention",
        "Each head computes a mean of the values of earlier positions, weighted by how well its query fits their keys.",
      ],
      rotary: [
        "Query-key norm, rotary positions",
        "Normalizes queries and keys, and rotates them by an angle that grows with the position.",
      ],
      mlp: [
        "MLP",
        "Transforms each position on its own: up projection, activation, down projection.",
      ],
      gated: [
        "Gated MLP",
        "Transforms each position on its own: an up projection times an activated gate, then a down projection.",
      ],
      finalNorm: ["Final norm", "The same, before the LM head."],
      head: ["LM head", "Computes a logit for each token of the vocabulary."],
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
    lead: ({ length, guaranteed_length }) =>
      `A solid line: this stretch stands in the training text, character by character. A dotted line: ${length} ` +
      `characters that occur in it, too, which is often just a common phrase. Copies of fewer than ` +
      `${guaranteed_length} characters may be missed.`,
    how: ({ count, characters }) =>
      `The page does not contain the training text, but ${number(count)} hashes of short stretches of its ` +
      `${number(characters)} characters. A wrong match has a probability of 1 in ${number(2 ** 32 / count)} at each place.`,
    found: (copies, phrases, longest) => {
      if (copies + phrases === 0) return "No match.";
      const copied = copies
        ? `${plural(copies, "copied stretch")}, the longest of at least ${plural(longest, "character")}`
        : "No copied stretch";
      return `${copied}; ${plural(phrases, "shorter match")}.`;
    },
    none: (reason) => `The page was made without this: ${reason}.`,
    passage: "The text, with its matches underlined",
    generate: (count, unit) => `Generate ${plural(count, unit)}`,
  },

  card: {
    name: "Card",
    title: "How this model was made",
    facts: "Facts",
    settings: "Settings that are not the defaults",
    sample: "A sample",
    limits: "Limits",
    limitTexts: (unit, block) => [
      "It imitates the texts that it was trained on. It has no other knowledge, no instructions and no safety training.",
      `A prediction depends on the last ${plural(block, unit)} at most.`,
      "Its text may contain stretches of the training text, and what is offensive in it.",
    ],
    words: "Words",
    glossary: [
      ["token", "what the model reads and predicts: a character, or a piece of a word (BPE)"],
      ["logit", "the score of a token; softmax turns scores into probabilities"],
      ["loss", "the mean surprise at the true next token, in nats; 1 nat is 1.44 bits"],
      ["bits per byte", "the surprise of a text, divided by its size as a file"],
      ["residual stream", "the vector of each position, to which all parts add their output"],
      ["LM head", "the matrix from the residual stream to the logits; tied: the embedding's"],
      ["rotary positions", "rotations of queries and keys: attention depends on distances"],
      ["gated MLP", "an MLP whose hidden values are multiplied by a gate"],
      ["silu, gelu", "smooth activations: near 0 below 0, near the identity above"],
      ["modern, gpt2", "the architectures of Folio: Qwen3's parts, or GPT-2's"],
      ["speedrun", "modern with n-gram embeddings"],
    ],
  },
};
