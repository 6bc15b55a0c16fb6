import { defineConfig } from 'tsup'

type Config = ReturnType<typeof defineConfig>

/** ESM and declarations for Node 22, one bundle an entry point. */
export function library(entry: string[] = ['src/index.ts']): Config {
  return defineConfig({
    entry,
    format: 'esm',
    target: 'node22',
    platform: 'node',
    dts: true,
    clean: true,
    sourcemap: true,
  })
}
