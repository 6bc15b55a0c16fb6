import { fileURLToPath } from 'node:url'
import { defineConfig } from 'vitest/config'

const packages = fileURLToPath(new URL('./packages/', import.meta.url))
export const alias = [
  { find: /^@varve\/testkit\/(.+)$/, replacement: `${packages}testkit/src/$1.ts` },
  { find: /^@varve\/([a-z0-9-]+)$/, replacement: `${packages}$1/src/index.ts` },
]
// biome-ignore lint/suspicious/noUndeclaredEnvVars: turbo runs no tests
const isThorough = process.env.VARVE_THOROUGH === '1'

export default defineConfig({
  resolve: { alias },
  test: {
    projects: [
      {
        extends: true,
        test: {
          name: 'unit',
          include: ['packages/*/test/**/*.test.ts', 'examples/test/**/*.test.ts'],
          exclude: ['**/*.lab.test.ts', '**/*.thorough.test.ts'],
          testTimeout: 60_000, // property tests on a busy machine
          // A process for each core and not for each file: starting them would take longer than the tests.
          isolate: false,
          maxWorkers: '100%',
        },
      },
      // Real programs, as root. Each file has servers and a libvirt of its own, and waits for them much of its time.
      {
        extends: true,
        test: {
          name: 'lab',
          include: [
            'packages/*/test/**/*.lab.test.ts',
            'examples/test/**/*.lab.test.ts',
            ...(isThorough ? ['packages/*/test/**/*.thorough.test.ts'] : []),
          ],
          maxWorkers: 3,
          testTimeout: 300_000,
          hookTimeout: 120_000,
        },
      },
    ],
  },
})
