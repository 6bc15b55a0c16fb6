import { afterAll, beforeAll, expect, test } from 'vitest'
import { type KillCase, KillCases } from './kill/kill-cases.ts'

let cases: KillCases

beforeAll(async () => {
  cases = await KillCases.prepare(1)
})
afterAll(() => cases[Symbol.asyncDispose]())

// One of each step that only RBD has; all points of all runs are in kill/kill-all.ts.
const SAMPLE: readonly KillCase[] = [
  { run: 'backup', point: 'after suspend', nth: 0, scope: 'group' },
  { run: 'backup', point: 'after rbd-snapshot', nth: 0, scope: 'process' },
  { run: 'restore', point: 'after image-create', nth: 1, scope: 'group' },
  { run: 'restore', point: 'end rbd rename', nth: 0, scope: 'process' },
  { run: 'restore in place', point: 'after write-in-place', nth: 1, scope: 'group' },
]

test.for(SAMPLE)('a $run that dies at "$point" leaves nothing, and the chain goes on', async one => {
  expect(await cases.run(one)).toBe(true)
})
