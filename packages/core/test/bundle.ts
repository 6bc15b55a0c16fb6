import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { build } from 'tsup'

const root = fileURLToPath(new URL('../../..', import.meta.url))

/** A program as one file, which goes with it. */
export interface Bundle extends AsyncDisposable {
  readonly path: string
}

/** Bundles a program that a test starts more than once: it then starts in a third of the time. */
export async function bundle(entry: URL): Promise<Bundle> {
  // Below the packages that the bundle imports.
  const cache = join(root, 'node_modules/.cache')
  await mkdir(cache, { recursive: true })
  const folder = await mkdtemp(join(cache, 'varve-bundle-'))
  await build({
    entry: [fileURLToPath(entry)],
    outDir: folder,
    format: 'esm',
    target: 'node22',
    platform: 'node',
    config: false,
    silent: true,
    external: ['@napi-rs/blake-hash', 'ssh2'], // native
    noExternal: [/^(?!@napi-rs|ssh2)/],
    outExtension: () => ({ js: '.js' }),
    banner: {
      js: "import { createRequire } from 'node:module'; const require = createRequire(import.meta.url);",
    },
  })
  return {
    path: join(folder, basename(entry.pathname).replace(/ts$/, 'js')),
    [Symbol.asyncDispose]: () => rm(folder, { recursive: true }),
  }
}
