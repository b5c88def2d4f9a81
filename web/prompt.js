/**
 * Weighted prompts, and prompts longer than the text encoder's context: `ldm/conditioning/prompt_syntax.py`, `prompt.py`.
 *
 *     (red)     weight 1.1        (red:1.3)   weight 1.3        [red]   weight 1 / 1.1        \( \) \[ \]   the characters
 *     BREAK     begins a new chunk
 */

const FACTORS = { "(": 1.1, "[": 1 / 1.1 };
const CLOSING = { ")": "(", "]": "[" };
const MAX_WEIGHT = 1000;
const MAX_CHUNKS = 32;
const TOKENS =
  /\\(?<escaped>[()[\]\\]?)|:\s*(?<number>[+-]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|[iI][nN][fF]|[nN][aA][nN]))\s*\)|[()[\]:]|[^\\()[\]:]+/gu;
const BREAK = /(?<![\p{L}\p{N}_])BREAK(?![\p{L}\p{N}_])/u;

/** Parse a prompt into pieces {text, weight}, neighbours of equal weight joined, in a new list after each BREAK. */
export function parsePrompt(prompt) {
  const texts = []; // null: BREAK
  const weights = [];
  const opened = { "(": [], "[": [] }; // where in `texts` the content of each open bracket begins
  const close = (bracket, factor) => {
    for (let i = opened[bracket].pop(); i < weights.length; i++) weights[i] *= factor;
  };
  for (const match of prompt.matchAll(TOKENS)) {
    const [token] = match;
    const { escaped, number } = match.groups;
    const bracket = CLOSING[token];
    if (escaped !== undefined) texts.push(escaped);
    else if (token in opened) opened[token].push(texts.length);
    else if (number !== undefined && opened["("].length) close("(", asNumber(number));
    else if (bracket && opened[bracket].length) close(bracket, FACTORS[bracket]);
    else texts.push(...token.split(BREAK).flatMap((part, i) => (i ? [null, part] : [part])));
    while (weights.length < texts.length) weights.push(1);
  }
  for (const bracket of ["(", "["]) while (opened[bracket].length) close(bracket, FACTORS[bracket]);
  return joined(texts, weights);
}

function asNumber(text) {
  return /[iI]/.test(text) ? Infinity : Number(text); // NaN too is refused below
}

function joined(texts, weights) {
  const sections = [[]];
  texts.forEach((text, i) => {
    const [weight, section] = [weights[i], sections.at(-1)];
    if (text === null) sections.push([]);
    else if (text && !(Math.abs(weight) <= MAX_WEIGHT))
      throw new Error(`the weight ${weight} of "${text.slice(0, 40)}" must be from -${MAX_WEIGHT} to ${MAX_WEIGHT}`);
    else if (text && section.at(-1)?.weight === weight) section.at(-1).text += text;
    else if (text) section.push({ text, weight });
  });
  return sections;
}

/** Cut a prompt into chunks {tokens, weights} of at most contextLength - 2 tokens, at least one. */
export function cut(tokenizer, prompt) {
  const room = tokenizer.contextLength - 2;
  const [comma] = tokenizer.encode(",");
  const chunks = [];
  const sections = parsePrompt(prompt);
  sections.forEach((section, i) => {
    const tokens = [];
    const weights = [];
    for (const { text, weight } of section) {
      const ids = tokenizer.encode(text);
      tokens.push(...ids);
      weights.push(...ids.map(() => weight));
    }
    while (tokens.length > room) {
      const end = cutAt(tokens, room, comma);
      chunks.push({ tokens: tokens.splice(0, end), weights: weights.splice(0, end) });
    }
    if (tokens.length || i + 1 < sections.length || !chunks.length) chunks.push({ tokens, weights });
  });
  if (chunks.length > MAX_CHUNKS)
    throw new Error(`the prompt is too long: it makes more than ${MAX_CHUNKS} chunks of ${room} tokens`);
  return chunks;
}

/** Return where to cut: after the last comma near the end of the first `room` tokens, else after all of them. */
function cutAt(tokens, room, comma) {
  if (tokens[room] === comma) return room; // it begins the next chunk
  for (let i = room - 1; i > room - 1 - Math.floor((20 * room) / 75); i--) if (tokens[i] === comma) return i + 1;
  return room;
}

/** Multiply one chunk's hidden states (n, d) by n weights, in place; scale it to its former mean where that is valid. */
export function weigh(states, weights) {
  if (weights.every((weight) => weight === 1)) return;
  const width = states.length / weights.length;
  let [before, after] = [0, 0];
  states.forEach((value, i) => {
    const weighted = value * weights[Math.floor(i / width)];
    before += value;
    after += weighted;
    states[i] = weighted;
  });
  const share = after / before; // a mean of the weights, if the tokens' own means share a sign
  if (share > 0 && share >= Math.min(...weights) && share <= Math.max(...weights))
    for (let i = 0; i < states.length; i++) states[i] /= share;
}
