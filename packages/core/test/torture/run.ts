/**
 * Kills backups, restores, deletions and prunes at their points for a while, and tells how many kills were survived;
 * then walks at random beside a model. See docs/reliability.md.
 *
 *   npm run test:torture -- [--seconds 600] [--seed 1] [--only restore|running|off|images] [--replay '<case>'] [--walk <seed>]
 */
import { parseArgs } from 'node:util'
import { startLibvirt } from '@varve/testkit/lab'
import { errorMessage } from '../../src/errors.ts'
import type { KillCase } from './kill-case.ts'
import { KillMatrix, scenarioOf, stepsWithoutACase } from './kill-matrix.ts'
import { ModelWalk } from './model-walk.ts'
import { ProvingGround } from './proving-ground.ts'
import { Random } from './random.ts'
import { SCENARIOS, type Scenario } from './scenarios.ts'

const { values } = parseArgs({
  options: {
    seconds: { type: 'string', default: '600' },
    seed: { type: 'string', default: '1' },
    only: { type: 'string' },
    replay: { type: 'string' },
    walk: { type: 'string' },
  },
})

/** How long a walk is. */
const WALK_STEPS = 100

/** A case as it is printed and replayed. */
type Replay = Omit<KillCase, 'scenario'> & { scenario: string }

const startedAt = Date.now()
const deadline = Date.now() + Number(values.seconds) * 1000
/** The last quarter is for walks beside the model. */
const killingUntil = startedAt + Number(values.seconds) * 750
const random = new Random(Number(values.seed))
const scenarios = SCENARIOS.filter(({ name, instance }) =>
  `${name} (${instance})`.includes(values.only ?? ''),
)
const onlyImages = scenarios.every(({ instance }) => instance === 'images')
await using lab = onlyImages ? undefined : await startLibvirt()
await using matrix = await KillMatrix.prepare(lab)

async function attempt(killCase: KillCase): Promise<boolean> {
  try {
    const { end } = await matrix.run(killCase)
    if (values.replay) console.log(end)
    return end.killed
  } catch (error) {
    failures.push(killCase)
    console.log(`FAILED: ${errorMessage(error)}`)
    if (error instanceof Error && error.cause) console.log(`  ${errorMessage(error.cause)}`)
    const replay = JSON.stringify({ ...killCase, scenario: killCase.scenario.name })
    console.log(`  npm run test:torture -- --replay '${replay}'`)
    return true
  }
}

const failures: KillCase[] = []
let kills = 0

if (values.replay) {
  const { scenario, ...replay }: Replay = JSON.parse(values.replay)
  if (await attempt({ ...replay, scenario: scenarioOf(scenario) })) kills++
} else if (values.walk === undefined) {
  const points = new Map<string, readonly string[]>()
  for (const scenario of scenarios) points.set(scenario.name, await matrix.points(scenario))
  const without = stepsWithoutACase()
  if (without.length > 0) throw new Error(`No scenario has the steps ${without.join(', ')}`)
  const total = [...points.values()].reduce((sum, { length }) => sum + length, 0)
  console.log(`${scenarios.length} scenarios with ${total} points, known after ${seconds()} s.`)

  const plain = scenarios.flatMap(scenario =>
    (points.get(scenario.name) ?? []).map((label, index) => ({ scenario, label, at: index + 1 })),
  )
  // Around the steps of the journal first, then everywhere, then everything at random.
  const isStep = (label: string) => label.startsWith('before ') || label.startsWith('after ')
  const inOrder = [
    ...shuffled(plain.filter(({ label }) => isStep(label))),
    ...shuffled(plain.filter(({ label }) => !isStep(label))),
  ]
  for (const { scenario, at } of inOrder) {
    if (Date.now() > killingUntil) break
    if (await attempt({ scenario, kill: { at }, seed: random.below(2 ** 31) })) kills++
  }
  while (Date.now() < killingUntil) {
    if (await attempt(atRandom(random.pick(scenarios), points))) kills++
  }
}
let walks = 0
let failedWalks = 0
if (values.walk !== undefined) await walk(Number(values.walk))
else if (!values.replay) while (Date.now() < deadline) await walk(random.below(2 ** 31))

console.log(`walks that ended right: ${walks - failedWalks} of ${walks}, of ${WALK_STEPS} steps each`)
console.log(`kills survived: ${kills - failures.length} of ${kills} in ${seconds()} s (seed ${values.seed})`)
process.exitCode = failures.length + failedWalks > 0 ? 1 : 0

/** Every other one with plain images, the rest with a domain where there is a libvirt. */
async function walk(seed: number): Promise<void> {
  walks++
  await using ground = await ProvingGround.create(seed % 2 === 0 ? lab : undefined)
  try {
    await new ModelWalk(ground, seed).run(WALK_STEPS)
  } catch (error) {
    failedWalks++
    console.log(`FAILED: ${errorMessage(error)}`)
    console.log(`  npm run test:torture -- --walk ${seed}`)
  }
}

function seconds(): number {
  return Math.round((Date.now() - startedAt) / 1000)
}

function atRandom(scenario: Scenario, points: ReadonlyMap<string, readonly string[]>): KillCase {
  const count = points.get(scenario.name)?.length ?? 1
  return {
    scenario,
    kill: random.oneIn(3) ? { afterMs: random.below(2500) } : { at: 1 + random.below(count) },
    scope: random.pick(['process', 'group']),
    ...(random.oneIn(3) && { recoverKill: 1 + random.below(40) }),
    ...(scenario.instance === 'running' &&
      random.oneIn(3) && { mishap: random.pick(['switched off', 'QEMU killed'] as const) }),
    second: random.oneIn(3),
    seed: random.below(2 ** 31),
  }
}

function shuffled<T>(items: readonly T[]): T[] {
  return items
    .map(item => ({ item, at: random.next() }))
    .sort((one, other) => one.at - other.at)
    .map(({ item }) => item)
}
