import { afterAll, beforeAll, expect, test } from 'vitest'
import { type KillCase, KillCases } from './kill/kill-cases.ts'

let cases: KillCases

beforeAll(async () => {
  cases = await KillCases.prepare(1)
})
afterAll(() => cases[Symbol.asyncDispose]())

// Beside that of kill.lab.test.ts: other steps of the same runs, and images whose backups are on S3.
const SAMPLE: readonly KillCase[] = [
  // First: the image still has the snapshot of every backup, and is rolled back.
  { kind: 'mixed', run: 'restore in place', point: 'end rbd snap rollback', nth: 0, scope: 'group' },
  { kind: 'mixed', run: 'restore', point: 'end rbd create', nth: 0, scope: 'group' },
  { kind: 'mixed', run: 'restore', point: 'end rbd rename', nth: 0, scope: 'process' },
  { kind: 'mixed', run: 'frozen backup', point: 'end virsh suspend', nth: 0, scope: 'group' },
  { kind: 'mixed', run: 'backup', point: 'after resumed', nth: 0, scope: 'process' },
  { kind: 'images', run: 'backup', point: 'end rbd snap create', nth: 0, scope: 'process' },
  { kind: 'images', run: 'restore', point: 'end rbd create', nth: 1, scope: 'group' },
]

test.for(SAMPLE)('$run ($kind) that dies at "$point" leaves nothing, and the chain goes on', async one => {
  expect(await cases.run(one)).toMatchObject({ killed: true })
})
