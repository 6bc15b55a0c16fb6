import { startLibvirt } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import type { KillCase } from './kill-case.ts'
import { KillMatrix, scenarioOf } from './kill-matrix.ts'
import { Random } from './random.ts'
import { aroundSteps, SCENARIOS } from './scenarios.ts'

// A sample of what `npm run test:torture` does; see docs/reliability.md.
const SEED = 119
const CASES = 4

export interface StepCase extends KillCase {
  readonly kill: { readonly at: number; readonly label: string }
}

// Nobody can tell whether libvirt was told to put the disk on its base: it must not end up on what that rests on.
export const AFTER_PIVOT: StepCase = {
  scenario: scenarioOf('increment of a running instance on a template'),
  kill: { at: 1, label: 'after pivot' },
  recoverKill: 'after unmerged',
  seed: 1,
}

const random = new Random(SEED)
const withSteps = SCENARIOS.filter(
  one => one.steps.length > 0 && one.from !== 'damaged' && one !== AFTER_PIVOT.scenario,
)
const cases: StepCase[] = Array.from({ length: CASES }, (_, index) => {
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

/** One of images, with the suite; and the others in the thorough mode. */
export const [SAMPLE, SECOND_SAMPLE] = [cases.slice(0, 1), cases.slice(1)] as const

/** Tests that each of these runs dies where it is to, and that the promise holds. Returns what runs other cases of their scenarios. */
export function testCases(
  sample: readonly StepCase[],
): (killCase: KillCase) => ReturnType<KillMatrix['run']> {
  let matrix: KillMatrix
  let stop: () => Promise<void>
  beforeAll(async () => {
    const lab = await startLibvirt()
    stop = () => lab.stop()
    matrix = await KillMatrix.prepare(
      lab,
      sample.map(({ scenario }) => scenario),
    )
  }, 300_000)
  afterAll(async () => {
    await matrix?.[Symbol.asyncDispose]()
    await stop?.()
  })

  test.each(sample.map(one => [one.scenario.name, one.kill.label, one] as const))(
    '%s, killed %s',
    async (_name, _at, killCase) => {
      const { end, recoverKilled } = await matrix.run(killCase)
      expect(end.killed).toBe(true)
      expect(recoverKilled).toBe(killCase.recoverKill !== undefined)
    },
  )
  return killCase => matrix.run(killCase)
}
