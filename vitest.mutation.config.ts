import { defineConfig } from 'vitest/config'
import { alias } from './vitest.config.ts'

// For scripts/mutate, which says which of these tests it runs.
export default defineConfig({
  resolve: { alias },
  test: {
    include: ['packages/{core,qcow2}/test/**/*.test.ts'],
    exclude: ['**/*.lab.test.ts'],
    setupFiles: 'vitest.mutation.setup.ts',
    testTimeout: 60_000,
    isolate: false,
  },
})
