import { readdirSync, readFileSync } from 'node:fs'
import { defineConfig, type Options } from 'tsup'

/** ESM for Node 22, one bundle an entry point. */
export const output: Options = {
  format: 'esm',
  target: 'node22',
  platform: 'node',
  clean: true,
  sourcemap: true,
}

const packages = new URL('packages/', import.meta.url)

// All in one process, as starting one for each would take longer than what it does.
export default defineConfig(
  readdirSync(packages).map(name => {
    const json = readFileSync(new URL(`${name}/package.json`, packages), 'utf8')
    const { dependencies, peerDependencies } = JSON.parse(json)
    return {
      ...output,
      name,
      entry: [...json.matchAll(/"\.\/dist\/(.+)\.js"/g)].map(
        ([, entry]) => `packages/${name}/src/${entry}.ts`,
      ),
      outDir: `packages/${name}/dist`,
      external: Object.keys({ ...dependencies, ...peerDependencies }).map(
        each => new RegExp(`^${each}(/|$)`),
      ),
    }
  }),
)
