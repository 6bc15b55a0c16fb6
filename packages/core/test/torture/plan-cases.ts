import type { KillCase } from './kill-case.ts'
import { chanceOf } from './random.ts'
import type { Scenario } from './scenarios.ts'

/** Random moments at which a run of each scenario dies. */
const MOMENTS = 8
const LATEST_MOMENT_MS = 2500

/**
 * A case for each point of each scenario, and some at random moments, in an order that the seed alone decides. Of every
 * four, two are around a step of the journal, one is elsewhere and one at a moment, as long as there are such.
 *
 * @param points of each scenario, when nobody kills its run
 */
export function planCases(points: ReadonlyMap<Scenario, readonly string[]>, seed: string): KillCase[] {
  const cases = [...points].flatMap(([scenario, labels]) => [
    ...numbered(labels).map(kill => withChance(scenario, kill, seed)),
    ...Array.from({ length: MOMENTS }, (_, index) => {
      const afterMs = Math.floor(chanceOf(`${seed} moment ${scenario.name} ${index}`) * LATEST_MOMENT_MS)
      return withChance(scenario, { afterMs }, seed)
    }),
  ])
  const kinds = Map.groupBy(inOrder(cases, seed), ({ kill }) =>
    kill && 'label' in kill ? (/^(before|after) /.test(kill.label ?? '') ? 'step' : 'elsewhere') : 'moment',
  )
  return [...kinds]
    .flatMap(([kind, ofKind]) =>
      ofKind.map((one, index) => ({ one, at: kind === 'step' ? index : 2 * index + 1 })),
    )
    .sort((one, other) => one.at - other.at)
    .map(({ one }) => one)
}

/** Each label with its number among those of the same name: other labels come in another order in each run. */
function numbered(labels: readonly string[]): { at: number; label: string }[] {
  const met = new Map<string, number>()
  return labels.map(label => {
    const at = (met.get(label) ?? 0) + 1
    met.set(label, at)
    return { at, label }
  })
}

/** How it dies, what happens before it is settled, and whether who settles it dies as well: early, as it has little to do. */
function withChance(scenario: Scenario, kill: NonNullable<KillCase['kill']>, seed: string): KillCase {
  const chance = (question: string) =>
    chanceOf(`${seed} ${question} ${scenario.name} ${JSON.stringify(kill)}`)
  const mishap = chance('mishap')
  return {
    scenario,
    kill,
    scope: chance('scope') < 1 / 2 ? 'process' : 'group',
    ...(chance('recover') < 1 / 3 && { recoverKill: 1 + Math.floor(chance('recover at') ** 2 * 40) }),
    ...(scenario.instance === 'running' &&
      mishap < 1 / 4 && { mishap: mishap < 1 / 8 ? ('switched off' as const) : ('QEMU killed' as const) }),
    second: chance('second') < 1 / 3,
    seed: Math.floor(chance('guest') * 2 ** 31),
  }
}

function inOrder(cases: readonly KillCase[], seed: string): KillCase[] {
  const at = ({ scenario, kill }: KillCase) =>
    chanceOf(`${seed} order ${scenario.name} ${JSON.stringify(kill)}`)
  return [...cases].sort((one, other) => at(one) - at(other))
}
