import { afterAll, beforeAll, expect, test } from 'vitest'
import { type KillCase, KillCases } from './kill/kill-cases.ts'

let cases: KillCases

beforeAll(async () => {
  cases = await KillCases.prepare(1)
})
afterAll(() => cases[Symbol.asyncDispose]())

// At each effect that only RBD has, which the journal must know of by then; all points of all runs are in
// kill/kill-all.ts.
const SAMPLE: readonly KillCase[] = [
  // First: the image still has the snapshot of every backup, and is rolled back.
  { run: 'restore in place', point: 'end rbd snap rollback', nth: 0, scope: 'group' },
  { run: 'backup', point: 'end virsh suspend', nth: 0, scope: 'group' },
  { run: 'backup', point: 'end rbd snap create', nth: 0, scope: 'process' },
  { run: 'backup', point: 'after resumed', nth: 0, scope: 'process' },
  { run: 'restore', point: 'end rbd create', nth: 1, scope: 'group' },
  { run: 'restore', point: 'end rbd rename', nth: 0, scope: 'process' },
]

test.for(SAMPLE)('a $run that dies at "$point" leaves nothing, and the chain goes on', async one => {
  expect(await cases.run(one)).toBe(true)
})
