// Highlights code in Rust, Python or JSON: splits it into pieces with the name of a colour.

export type Piece = [kind: string | null, text: string];

// The name of a group is the name of a colour. Alternatives that may be unterminated also match up to the end of the text, so
// that a half-streamed string or comment has its colour, and matching is linear.
const RUST = new RegExp(
  [
    String.raw`(?<comment>\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$))`,
    String.raw`(?<string>b?r(?<hashes>#*)"[\s\S]*?(?:"\k<hashes>|$)|[bc]?"(?:\\[\s\S]|[^"\\])*(?:"|$)|b?'(?:\\(?:u\{[0-9a-fA-F_]*\}|x..|.)|[^'\\\n])')`,
    String.raw`(?<attribute>#!?\[[^\]\n]*\]?)`,
    String.raw`(?<lifetime>'[A-Za-z_]\w*)`,
    String.raw`(?<number>\b\d[\w]*(?:\.\d\w*)?)`,
    String.raw`(?<keyword>\b(?:as|async|await|break|const|continue|crate|dyn|else|enum|extern|false|fn|for|if|impl|in|let|loop|match|mod|move|mut|pub|ref|return|self|static|struct|super|trait|true|type|union|unsafe|use|where|while)\b)`,
    String.raw`(?<type>\b(?:Self|[A-Z]\w*|[iu](?:8|16|32|64|128|size)|f32|f64|bool|char|str)\b)`,
    String.raw`(?<macro>\b[a-z_]\w*!(?!=))`,
    String.raw`(?<function>\b[a-z_]\w*(?=\s*(?:\(|::<)))`,
    String.raw`(?<plain>\b[a-z_]\w*)`,
  ].join('|'),
  'g',
);

const PYTHON = new RegExp(
  [
    String.raw`(?<comment>#[^\n]*)`,
    String.raw`(?<string>(?:[rbfuRBFU]{1,2})?(?:"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\[\s\S]|[^"\\\n])*"?|'(?:\\[\s\S]|[^'\\\n])*'?))`,
    String.raw`(?<attribute>@[A-Za-z_][\w.]*)`,
    String.raw`(?<number>\b\d[\w]*(?:\.\d\w*)?)`,
    String.raw`(?<keyword>\b(?:and|as|assert|async|await|break|case|class|continue|def|del|elif|else|except|False|finally|for|from|global|if|import|in|is|lambda|match|None|nonlocal|not|or|pass|raise|return|self|True|try|while|with|yield)\b)`,
    String.raw`(?<type>\b(?:[A-Z]\w*|int|float|str|bytes|bool|list|dict|set|tuple)\b)`,
    String.raw`(?<function>\b[a-z_]\w*(?=\s*\())`,
    String.raw`(?<plain>\b[a-z_]\w*)`,
  ].join('|'),
  'g',
);

const JSON_TEXT = new RegExp(
  [
    String.raw`(?<type>"(?:\\[\s\S]|[^"\\\n])*"(?=\s*:))`,
    String.raw`(?<string>"(?:\\[\s\S]|[^"\\\n])*"?)`,
    String.raw`(?<number>-?\b\d[\d.eE+-]*)`,
    String.raw`(?<keyword>\b(?:true|false|null)\b)`,
  ].join('|'),
  'g',
);

const LANGUAGES: Record<string, RegExp> = {
  rust: RUST,
  rs: RUST,
  python: PYTHON,
  py: PYTHON,
  json: JSON_TEXT,
  jsonl: JSON_TEXT,
};

/** The joined pieces equal `code`. Code in other languages is one piece. */
export function highlight(code: string, language: string): Piece[] {
  const pattern = LANGUAGES[language.toLowerCase()];
  if (!pattern || code.length > 200_000) return [[null, code]];
  const pieces: Piece[] = [];
  let end = 0;
  for (const match of code.matchAll(pattern)) {
    const kind = Object.entries(match.groups ?? {}).find(([name, text]) => name !== 'hashes' && text !== undefined)?.[0];
    if (kind === undefined || kind === 'plain') continue;
    if (match.index > end) pieces.push([null, code.slice(end, match.index)]);
    pieces.push([kind, match[0]]);
    end = match.index + match[0].length;
  }
  if (end < code.length) pieces.push([null, code.slice(end)]);
  return pieces;
}
