import { fileURLToPath } from 'node:url'
import { defineConfig } from 'vitest/config'

const packages = fileURLToPath(new URL('./packages/', import.meta.url))
const alias = [
  { find: /^@varve\/testkit\/(.+)$/, replacement: `${packages}testkit/src/$1.ts` },
  { find: /^@varve\/([a-z0-9-]+)$/, replacement: `${packages}$1/src/index.ts` },
]

export default defineConfig({
  resolve: { alias },
  test: {
    projects: [
      {
        extends: true,
        test: {
          name: 'unit',
          include: ['packages/*/test/**/*.test.ts', 'examples/test/**/*.test.ts'],
          exclude: ['**/*.lab.test.ts'],
          testTimeout: 60_000, // property tests on a busy machine
        },
      },
      {
        // Real servers and a real VM, as root; one file at a time, since they share one libvirt.
        extends: true,
        test: {
          name: 'lab',
          include: ['packages/*/test/**/*.lab.test.ts', 'examples/test/**/*.lab.test.ts'],
          fileParallelism: false,
          testTimeout: 300_000,
          hookTimeout: 120_000,
        },
      },
    ],
  },
})
