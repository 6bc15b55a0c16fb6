import { type LibvirtLab, startLibvirt } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import type { KillCase } from './torture/kill-case.ts'
import { KillMatrix, scenarioOf, stepsWithoutACase } from './torture/kill-matrix.ts'
import { Random } from './torture/random.ts'
import { aroundSteps, SCENARIOS } from './torture/scenarios.ts'

// A sample of what `npm run test:torture` does; see docs/reliability.md.
const SEED = 119
const CASES = 4

let lab: LibvirtLab
let matrix: KillMatrix
beforeAll(async () => {
  lab = await startLibvirt()
  matrix = await KillMatrix.prepare(
    lab,
    all.map(({ scenario }) => scenario),
  )
}, 300_000)
afterAll(async () => {
  await matrix?.[Symbol.asyncDispose]()
  await lab?.stop()
})

test('every step that a journal may hold has a run that is killed before and after it', () => {
  expect(stepsWithoutACase()).toEqual([])
})

interface Case extends KillCase {
  readonly kill: { readonly at: number; readonly label: string }
}

// Nobody can tell whether libvirt was told to put the disk on its base: it must not end up on what that rests on.
const afterPivot: Case = {
  scenario: scenarioOf('increment of a running instance on a template'),
  kill: { at: 1, label: 'after pivot' },
  recoverKill: 'after unmerged',
  seed: 1,
}

const random = new Random(SEED)
const withSteps = SCENARIOS.filter(
  one => one.steps.length > 0 && one.from !== 'damaged' && one !== afterPivot.scenario,
)
const cases: Case[] = Array.from({ length: CASES }, (_, index) => {
  // Images and domains in turn.
  const scenario = random.pick(
    withSteps.filter(({ instance }) => (instance === 'images') === (index % 2 === 0)),
  )
  return {
    scenario,
    kill: { at: 1, label: random.pick(aroundSteps(scenario)) },
    scope: random.pick(['process', 'group'] as const),
    ...(index % 3 === 0 && { recoverKill: 1 + random.below(3) }),
    seed: random.below(2 ** 31),
  }
})

// What is left incomplete is told of again where recover() dies right after it has recorded that.
const half: Case = {
  scenario: scenarioOf('restore in place that fails at its second disk'),
  kill: { at: 1, label: 'before incomplete' },
  recoverKill: 2,
  seed: 1,
}

test('a restore in place that dies when a part of a disk is written leaves it incomplete', async () => {
  const { end, settled } = await matrix.run({
    scenario: scenarioOf('restore in place of images'),
    kill: { at: 2, label: 'target write done' },
    scope: 'group',
    seed: 2,
  })
  expect(end).toEqual({ killed: true, point: 'target write done' })
  expect(settled.map(({ outcome }) => outcome)).toEqual(['incomplete'])
})

const all = [...cases, half, afterPivot]
test.each(all.map(one => [one.scenario.name, one.kill.label, one] as const))(
  '%s, killed %s',
  async (_name, _at, killCase) => {
    const { end, recoverKilled } = await matrix.run(killCase)
    expect(end.killed).toBe(true)
    expect(recoverKilled).toBe(killCase.recoverKill !== undefined)
  },
)
