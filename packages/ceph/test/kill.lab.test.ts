import { afterAll, beforeAll, expect, test } from 'vitest'
import { type KillCase, KillCases } from './kill/kill-cases.ts'
import { stepsWithoutARun } from './kill/kill-runs.ts'

let cases: KillCases

beforeAll(async () => {
  cases = await KillCases.prepare(1)
})
afterAll(() => cases[Symbol.asyncDispose]())

// At an effect that only RBD has, which the journal must know of by then; more in kill.thorough.test.ts, and all points of all
// runs in kill/kill-all.ts.
const SAMPLE: readonly KillCase[] = [
  // With the guest suspended, and its file systems frozen.
  { kind: 'mixed', run: 'frozen backup', point: 'end rbd snap create', nth: 0, scope: 'group' },
]

test('every step of a journal is in a run', () => {
  expect(stepsWithoutARun()).toEqual([])
})

test.for(SAMPLE)('$run ($kind) that dies at "$point" leaves nothing, and the chain goes on', async one => {
  expect(await cases.run(one)).toMatchObject({ killed: true })
})
