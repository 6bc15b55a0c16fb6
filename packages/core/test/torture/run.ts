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
import { planCases } from './plan-cases.ts'
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
const WALK_STEPS = 300

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
if (scenarios.length === 0) throw new Error(`No scenario has "${values.only}" in its name.`)
const onlyImages = scenarios.every(({ instance }) => instance === 'images')
await using lab = onlyImages ? undefined : await startLibvirt()
await using matrix = await KillMatrix.prepare(lab)

const failures: KillCase[] = []
let [kills, ofGroups, atMoments, ofRecover] = [0, 0, 0, 0]

async function attempt(killCase: KillCase): Promise<void> {
  try {
    const { end, recoverKilled } = await matrix.run(killCase)
    if (values.replay) console.log(end, { recoverKilled })
    if (!end.killed) return
    kills++
    if (killCase.scope === 'group') ofGroups++
    if (killCase.kill && 'afterMs' in killCase.kill) atMoments++
    if (recoverKilled) ofRecover++
  } catch (error) {
    failures.push(killCase)
    console.log(`FAILED: ${errorMessage(error)}`)
    if (error instanceof Error && error.cause) console.log(`  ${errorMessage(error.cause)}`)
    const replay = JSON.stringify({ ...killCase, scenario: killCase.scenario.name })
    console.log(`  npm run test:torture -- --replay '${replay}'`)
  }
}

if (values.replay) {
  const { scenario, ...replay }: Replay = JSON.parse(values.replay)
  await attempt({ ...replay, scenario: scenarioOf(scenario) })
} else if (values.walk === undefined) {
  const points = new Map<Scenario, readonly string[]>()
  for (const scenario of scenarios) points.set(scenario, await matrix.points(scenario))
  const without = stepsWithoutACase()
  if (without.length > 0) throw new Error(`No scenario has the steps ${without.join(', ')}`)
  const total = [...points.values()].reduce((sum, { length }) => sum + length, 0)
  console.log(`${scenarios.length} scenarios with ${total} points, known after ${seconds()} s.`)
  for (let round = 0; Date.now() < killingUntil; round++) {
    for (const killCase of planCases(points, `${values.seed} ${round}`)) {
      if (Date.now() > killingUntil) break
      await attempt(killCase)
    }
  }
}
let walks = 0
let failedWalks = 0
if (values.walk !== undefined) await walk(Number(values.walk))
else if (!values.replay) while (Date.now() < deadline) await walk(random.below(2 ** 31))

console.log(`walks that ended right: ${walks - failedWalks} of ${walks}, of ${WALK_STEPS} steps each`)
console.log(
  `kills survived: ${kills}, failed: ${failures.length}, in ${seconds()} s (seed ${values.seed}); of the former ${ofGroups} with all that was started, ${atMoments} at a random moment, ${ofRecover} with recover killed too`,
)
const proved = values.walk === undefined ? kills : walks
if (proved === 0) console.log('FAILED: there was no time for anything, which proves nothing.')
process.exitCode = failures.length + failedWalks > 0 || proved === 0 ? 1 : 0

/** Every other one with plain images, the rest with a domain where there is a libvirt. */
async function walk(seed: number): Promise<void> {
  walks++
  await using ground = await ProvingGround.create(seed % 2 === 0 ? lab : undefined)
  try {
    await new ModelWalk(ground, seed).run(WALK_STEPS)
  } catch (error) {
    failedWalks++
    console.log(`FAILED: ${errorMessage(error)}`)
    // Whether there is a libvirt decides what is walked with.
    console.log(`  npm run test:torture -- ${onlyImages ? '--only images ' : ''}--walk ${seed}`)
  }
}

function seconds(): number {
  return Math.round((Date.now() - startedAt) / 1000)
}
