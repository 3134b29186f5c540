// A block of code with syntax highlighting and a copy button.
import { useState } from 'preact/hooks';
import { copyText } from '../base/browser';
import { highlight } from './highlight';

export function Code({ code, language }: { code: string; language: string }) {
  return (
    <figure class="code">
      <figcaption>
        <span>{language || 'text'}</span>
        <CopyButton text={code} label="Copy code" />
      </figcaption>
      <pre tabIndex={0}>
        <code>
          {highlight(code, language).map(([kind, text]) => (kind === null ? text : <span class={`hl-${kind}`}>{text}</span>))}
        </code>
      </pre>
    </figure>
  );
}

export function CopyButton({ text, label }: { text: string; label: string }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    if (!(await copyText(text))) return;
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return (
    <button type="button" class="quiet" aria-label={label} onClick={copy}>
      {copied ? 'Copied' : 'Copy'}
    </button>
  );
}
