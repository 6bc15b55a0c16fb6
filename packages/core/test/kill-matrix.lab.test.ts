import { type LibvirtLab, startLibvirt } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import type { KillCase } from './torture/kill-case.ts'
import { KillMatrix, unreachedSteps } from './torture/kill-matrix.ts'
import { Random } from './torture/random.ts'
import { SCENARIOS } from './torture/scenarios.ts'

// A sample of what `npm run test:torture` does; see docs/reliability.md.
const SEED = 7

let lab: LibvirtLab
let matrix: KillMatrix
const points = new Map<string, readonly string[]>()

beforeAll(async () => {
  lab = await startLibvirt()
  matrix = await KillMatrix.prepare(lab)
})
afterAll(async () => {
  await matrix[Symbol.asyncDispose]()
  await lab.stop()
})

test('every step that a journal may hold has a run that is killed before and after it', async () => {
  for (const scenario of SCENARIOS) points.set(scenario.name, await matrix.points(scenario))
  expect(unreachedSteps(points)).toEqual([])
})

test.each(SCENARIOS.map((scenario, index) => [scenario.name, scenario, index] as const))(
  'killed in the middle: %s',
  async (name, scenario, index) => {
    const reached = points.get(name) ?? expect.fail('its points are not known')
    const random = new Random(SEED + index)
    const around = reached.flatMap((label, at) => (/^(before|after) /.test(label) ? [at + 1] : []))
    const killCase: KillCase = {
      scenario,
      kill: { at: around.length > 0 ? random.pick(around) : 1 + random.below(reached.length) },
      scope: index % 2 === 0 ? 'process' : 'group',
      ...(index % 3 === 0 && { recoverKill: 1 + random.below(20) }),
      seed: random.below(2 ** 31),
    }
    expect((await matrix.run(killCase)).end.killed).toBe(true)
  },
)
