import { defineConfig } from 'vitest/config'
import { alias } from './vitest.config.ts'

// The tests that mutants are run against: those of the unit project that are of the mutated packages.
export default defineConfig({
  resolve: { alias },
  test: {
    include: ['packages/{core,qcow2}/test/**/*.test.ts'],
    exclude: ['**/*.lab.test.ts'],
    testTimeout: 60_000,
    isolate: false,
  },
})
