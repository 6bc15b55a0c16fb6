import { fileURLToPath } from 'node:url'
import { defineConfig } from 'vitest/config'
import { BaseSequencer, type TestSpecification } from 'vitest/node'

const packages = fileURLToPath(new URL('./packages/', import.meta.url))
export const alias = [
  { find: /^@varve\/testkit\/(.+)$/, replacement: `${packages}testkit/src/$1.ts` },
  { find: /^@varve\/([a-z0-9-]+)$/, replacement: `${packages}$1/src/index.ts` },
]
// biome-ignore lint/suspicious/noUndeclaredEnvVars: turbo runs no tests
const isThorough = process.env.VARVE_THOROUGH === '1'

// The slowest first: the others fill the time beside the last of them.
const slowest = [
  'driver-rclone/test/contract',
  'driver-s3/test/contract',
  'driver-sftp/test/contract',
  'examples/test/demo',
  'core/test/vm-guest',
  'ceph/test/vm-rbd',
  'driver-rclone/test/remotes',
  'examples/test/remote-storage',
  'driver-ftp/test/contract',
  'testkit/test/lab',
  'ceph/test/kill',
  'ceph/test/rbd-restore',
  'ceph/test/rbd-backup',
  'ceph/test/rbd-snapshots',
  'core/test/kill-matrix',
  'core/test/concurrency',
  'core/test/vm-restore-mishaps',
  'core/test/vm-backup',
  'core/test/vm-host-mishaps',
  'core/test/vm-control',
  'ceph/test/export-diff',
  'ceph/test/ceph-cluster',
]

class SlowestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const rank = ({ moduleId }: TestSpecification) => {
      const found = slowest.findIndex(name => moduleId.includes(`/${name}.`))
      return found === -1 ? slowest.length : found
    }
    return (await super.sort(files)).toSorted((one, other) => rank(one) - rank(other))
  }
}

export default defineConfig({
  resolve: { alias },
  test: {
    sequence: { sequencer: SlowestFirst },
    projects: [
      {
        extends: true,
        test: {
          name: 'unit',
          include: ['{packages/*,examples}/test/**/*.test.ts'],
          exclude: ['**/*.lab.test.ts', '**/*.thorough.test.ts'],
          testTimeout: 60_000, // property tests on a busy machine
          // Few processes and not one for each file: starting them would take longer than the tests. One more than the
          // cores of a small machine, as some wait for time to pass.
          isolate: false,
          maxWorkers: 3,
        },
      },
      // Real programs, as root. Each file has servers and a libvirt of its own, and waits for them much of its time.
      {
        extends: true,
        test: {
          name: 'lab',
          include: [
            '{packages/*,examples}/test/**/*.lab.test.ts',
            ...(isThorough ? ['{packages/*,examples}/test/**/*.thorough.test.ts'] : []),
          ],
          // Little room for new objects: after each start of a program every page of it that is written to costs a fault.
          execArgv: ['--max-semi-space-size=1'],
          maxWorkers: 3,
          testTimeout: 300_000,
          hookTimeout: 120_000,
        },
      },
    ],
  },
})
