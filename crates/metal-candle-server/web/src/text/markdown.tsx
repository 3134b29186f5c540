// Renders Markdown as elements. HTML is never parsed, so a response cannot inject markup.
import MarkdownIt from 'markdown-it';
import { type ComponentChildren, h } from 'preact';
import { useMemo } from 'preact/hooks';
import { Code } from './code';

const parser = new MarkdownIt({ html: false, linkify: true, breaks: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });

type Token = ReturnType<typeof parser.parse>[number];

// Headings of a response are one level below the headings of the page.
const TAGS: Record<string, string> = {
  p: 'p', blockquote: 'blockquote', ul: 'ul', ol: 'ol', li: 'li',
  h1: 'h3', h2: 'h4', h3: 'h5', h4: 'h6', h5: 'h6', h6: 'h6',
  table: 'table', thead: 'thead', tbody: 'tbody', tr: 'tr', th: 'th', td: 'td',
  strong: 'strong', em: 'em', s: 's',
};

export function Markdown({ text }: { text: string }) {
  return useMemo(() => <div class="markdown">{render(parser.parse(text, {}))}</div>, [text]);
}

function render(tokens: Token[]): ComponentChildren[] {
  const levels: { token: Token | null; children: ComponentChildren[] }[] = [{ token: null, children: [] }];
  const append = (child: ComponentChildren) => levels[levels.length - 1]!.children.push(child);
  for (const token of tokens) {
    if (token.nesting === 1) {
      levels.push({ token, children: [] });
    } else if (token.nesting === -1) {
      const closed = levels.pop()!;
      append(element(closed.token!, closed.children));
    } else {
      append(leaf(token));
    }
  }
  return levels[0]!.children;
}

function element(token: Token, children: ComponentChildren[]): ComponentChildren {
  if (token.hidden) return children;
  if (token.tag === 'a') {
    const href = token.attrGet('href')?.toString() ?? null;
    return href !== null && isOutside(href) ? link(href, children) : children;
  }
  const tag = TAGS[token.tag];
  if (tag === undefined) return children;
  if (tag === 'ol') return h('ol', { start: Number(token.attrGet('start') ?? 1) }, children);
  if (tag === 'table') return <div class="scroll-x">{h('table', null, children)}</div>;
  const alignment = /text-align:\s*(right|center)/.exec(String(token.attrGet('style') ?? ''))?.[1];
  return h(tag, alignment ? { class: alignment } : null, children);
}

function leaf(token: Token): ComponentChildren {
  switch (token.type) {
    case 'inline':
      return render(token.children ?? []);
    case 'code_inline':
      return <code>{token.content}</code>;
    case 'fence':
      return <Code code={token.content} language={token.info.trim().split(/\s+/)[0] ?? ''} />;
    case 'code_block':
      return <Code code={token.content} language="" />;
    case 'softbreak':
    case 'hardbreak':
      return <br />;
    case 'hr':
      return <hr />;
    case 'image':
      return image(token);
    default:
      return token.content;
  }
}

/** Images are never loaded, because a request would reveal the user to another host. */
function image(token: Token): ComponentChildren {
  const source = token.attrGet('src')?.toString() ?? null;
  const name = `image: ${token.content || 'no description'}`;
  return source !== null && isOutside(source) ? link(source, name) : name;
}

function link(href: string, children: ComponentChildren): ComponentChildren {
  return (
    <a href={href} rel="noreferrer noopener" target="_blank">
      {children}
    </a>
  );
}

function isOutside(href: string): boolean {
  return /^(?:https?:\/\/|mailto:)/i.test(href);
}
