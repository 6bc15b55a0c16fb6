import { fileURLToPath } from 'node:url'
import { defineConfig, type TestProjectInlineConfiguration } from 'vitest/config'

const packages = fileURLToPath(new URL('./packages/', import.meta.url))
const alias = [
  { find: /^@varve\/testkit\/(.+)$/, replacement: `${packages}testkit/src/$1.ts` },
  { find: /^@varve\/([a-z0-9-]+)$/, replacement: `${packages}$1/src/index.ts` },
]

const remote = 'packages/{ceph,driver-s3,driver-sftp,driver-ftp,driver-rclone}/test/**/*.lab.test.ts'

function labProject(name: string, include: string[], exclude: string[]): TestProjectInlineConfiguration {
  return {
    extends: true,
    test: { name, include, exclude, fileParallelism: false, testTimeout: 300_000, hookTimeout: 120_000 },
  }
}

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
          // A process for each core and not for each file: starting them would take longer than the tests.
          isolate: false,
          maxWorkers: '100%',
        },
      },
      // Real programs, as root. One file at a time: they share one libvirt.
      labProject('lab', ['packages/*/test/**/*.lab.test.ts', 'examples/test/**/*.lab.test.ts'], [remote]),
      // The remote storages and Ceph against their real servers: they share nothing with the others, and may run beside them.
      labProject('servers', [remote], []),
    ],
  },
})
