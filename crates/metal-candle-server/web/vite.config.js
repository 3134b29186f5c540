// Builds the web UI as three files with fixed names, and `build.json` with the digests that `page.rs` checks.
import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { gzipSync } from 'node:zlib';
import { defineConfig } from 'vite';
import { digestOfSources, sha256 } from './tools/digest.mjs';

const root = fileURLToPath(new URL('.', import.meta.url));
const GZIP_LIMIT = 150_000;

function digests() {
  return {
    name: 'digests',
    apply: 'build',
    closeBundle() {
      const files = {};
      let gzip = 0;
      for (const name of readdirSync(`${root}/dist`).filter((name) => name !== 'build.json').sort()) {
        const bytes = readFileSync(`${root}/dist/${name}`);
        files[name] = sha256(bytes);
        gzip += gzipSync(bytes, { level: 9 }).length;
      }
      if (gzip > GZIP_LIMIT) throw new Error(`the web UI has ${gzip} bytes compressed, more than the limit of ${GZIP_LIMIT}`);
      writeFileSync(`${root}/dist/build.json`, `${JSON.stringify({ sources: digestOfSources(root), files }, null, 2)}\n`);
      console.log(`compressed: ${gzip} bytes in total`);
    },
  };
}

const api = Object.fromEntries(
  ['/v1', '/props', '/metrics', '/health', '/tokenize', '/detokenize'].map((path) => [path, process.env.SERVER ?? 'http://127.0.0.1:8080']),
);

export default defineConfig({
  root,
  base: './',
  plugins: [digests()],
  server: { proxy: api },
  test: { include: ['test/**/*.test.ts'] },
  build: {
    target: ['chrome123', 'firefox121', 'safari17.5'],
    modulePreload: false,
    assetsInlineLimit: 0,
    cssCodeSplit: false,
    chunkSizeWarningLimit: 600,
    rolldownOptions: {
      output: {
        entryFileNames: 'app.js',
        assetFileNames: 'app[extname]',
        codeSplitting: false,
      },
    },
  },
});
