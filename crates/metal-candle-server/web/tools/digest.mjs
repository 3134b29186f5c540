// Computes the digest of the sources. A test of `page.rs` computes the same digest.
import { createHash } from 'node:crypto';
import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';

const FILES = ['index.html', 'package-lock.json', 'package.json', 'tools/digest.mjs', 'tsconfig.json', 'vite.config.js'];

/** The paths in `folder`, relative to `root`, with `/` on every system. */
function walk(root, folder) {
  return readdirSync(join(root, folder), { withFileTypes: true }).flatMap((entry) => {
    const path = `${folder}/${entry.name}`;
    return entry.isDirectory() ? walk(root, path) : [path];
  });
}

/** SHA-256 of `path NUL length NUL bytes` of every source, sorted by the bytes of the path. CRLF counts as LF. */
export function digestOfSources(root) {
  const hash = createHash('sha256');
  for (const path of [...FILES, ...walk(root, 'src')].sort()) {
    const bytes = Buffer.from(readFileSync(join(root, path), 'utf8').replaceAll('\r\n', '\n'));
    hash.update(`${path}\0${bytes.length}\0`);
    hash.update(bytes);
  }
  return hash.digest('hex');
}

export const sha256 = (bytes) => createHash('sha256').update(bytes).digest('hex');
