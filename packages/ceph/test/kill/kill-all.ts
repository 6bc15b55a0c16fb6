/**
 * Kills runs on instances with RBD images at their points, in an order that the seed alone decides, for so many seconds;
 * see docs/reliability.md. Says where to go on.
 *
 *   npm run test:torture:rbd -- [--seconds 600] [--seed 1] [--from 0] [--only 'restore in place (domain)'] [--replay '<case>']
 */
import { parseArgs } from 'node:util'
import { errorMessage } from '../../../core/src/errors.ts'
import { chanceOf } from '../../../core/test/torture/random.ts'
import { type KillCase, KillCases } from './kill-cases.ts'
import { type KillRun, RUNS, stepsWithoutARun } from './kill-runs.ts'

/** Random moments at which each run dies; a run takes some seconds. */
const MOMENTS = 4
const LATEST_MOMENT_MS = 6000

const { values } = parseArgs({
  options: {
    seconds: { type: 'string', default: '600' },
    seed: { type: 'string', default: '1' },
    from: { type: 'string', default: '0' },
    only: { type: 'string', default: '' },
    replay: { type: 'string' },
  },
})
const seed = Number(values.seed)
const startedAt = Date.now()
const deadline = startedAt + Number(values.seconds) * 1000
const without = stepsWithoutARun()
if (without.length > 0) throw new Error(`No run has the steps ${without.join(', ')}`)
const runs = RUNS.filter(({ name, kind }) => `${name} (${kind})`.includes(values.only))
if (runs.length === 0) throw new Error(`No run has "${values.only}" in its name.`)
let cases = await KillCases.prepare(seed)
const replay: KillCase | undefined = values.replay && JSON.parse(values.replay)
const atSteps = replay ? [replay] : eachRunFirst(inOrder(runs.flatMap(aroundSteps)))
const first = replay ? atSteps : withMoments(atSteps, inOrder(runs.flatMap(moments)))
let all = first
const from = Number(values.from)
let next = from
let [kills, killsAtMoments, recoverKills, failures] = [0, 0, 0, 0]
while (Date.now() < deadline) {
  if (!replay && all === first && next >= first.length) all = [...first, ...inOrder(await otherCases())]
  const one = all[next++]
  if (!one) break
  try {
    const { killed, recoverKilled } = await cases.run(one)
    if (recoverKilled) recoverKills++
    if (killed) kills++
    if (killed && one.afterMs !== undefined) killsAtMoments++
    if (!killed && one.afterMs === undefined && next <= first.length)
      throw new Error(`The run does not reach "${one.point}".`)
  } catch (error) {
    failures++
    console.log(`FAILED: ${errorMessage(error)}`)
    if (error instanceof Error && error.cause) console.log(`  ${errorMessage(error.cause)}`)
    console.log(`  npm run test:torture:rbd -- --replay '${JSON.stringify(one)}'`)
    // The next case would begin with what this one left.
    await cases[Symbol.asyncDispose]()
    cases = await KillCases.prepare(seed)
  }
  if ((next - from) % 10 === 0)
    console.log(`${next} of ${all.length}; ${kills} kills survived; ${seconds()} s`)
}
await cases[Symbol.asyncDispose]()
const others = all === first ? `, the ${first.length} around the steps and at random moments` : ''
console.log(
  `points ${from} to ${next} of ${all.length}${others}: ${kills} kills survived, ${killsAtMoments} of them at a random moment, ${recoverKills} with recover killed too, ${failures} failed, in ${seconds()} s (seed ${seed})`,
)
if (next < all.length || all === first) console.log(`to go on: --seed ${seed} --from ${next}`)
if (kills === 0) console.log('FAILED: no run was killed, which proves nothing.')
process.exitCode = failures > 0 || kills === 0 ? 1 : 0

/** Before and after each step of a run, or what it removes of the images: those are known without a run. */
function aroundSteps({ kind, name: run, steps }: KillRun): KillCase[] {
  const around = steps.flatMap(step => [`before ${step}`, `after ${step}`])
  const points = steps.length > 0 ? around : ['start rbd snap rm', 'end rbd snap rm']
  return points.map(point => withChance({ kind, run, point, nth: 0, scope: 'process' }))
}

/** Random moments of a run, some of them after its end: then it was none. */
function moments({ kind, name: run }: KillRun): KillCase[] {
  return Array.from({ length: MOMENTS }, (_, nth) => {
    const one = withChance({ kind, run, point: 'a moment', nth, scope: 'process' })
    return { ...one, afterMs: Math.floor(chance(one, 'moment') * LATEST_MOMENT_MS) }
  })
}

/** One at a moment after every three at a step, and the rest behind. */
function withMoments(atSteps: readonly KillCase[], atMoments: readonly KillCase[]): KillCase[] {
  const mixed = atSteps.flatMap((one, index) => {
    const moment = atMoments[(index - 2) / 3] // of every third index only
    return moment ? [one, moment] : [one]
  })
  return [...mixed, ...atMoments.slice(Math.floor(atSteps.length / 3))]
}

/** All other points of the runs, by a run of each that nobody kills. */
async function otherCases(): Promise<KillCase[]> {
  const known = new Set(first.map(nameOf))
  const found: KillCase[] = []
  for (const run of runs) {
    const points = await cases.points(run)
    const met = new Map<string, number>()
    for (const point of points) {
      const nth = met.get(point) ?? 0
      met.set(point, nth + 1)
      const one = withChance({ kind: run.kind, run: run.name, point, nth, scope: 'process' })
      if (!known.has(nameOf(one))) found.push(one)
    }
    console.log(`${run.name} (${run.kind}): ${points.length} points`)
  }
  return found
}

function inOrder(found: readonly KillCase[]): KillCase[] {
  return [...found].sort((a, b) => chance(a, 'order') - chance(b, 'order'))
}

/** What a run does at a step is much the same in all kinds of instances: so each is met in one of them before any is in two. */
function eachRunFirst(found: readonly KillCase[]): KillCase[] {
  const met = new Set<string>()
  const isNew = ({ run, point }: KillCase) => met.size < met.add(`${run} ${point}`).size
  const once = found.filter(isNew)
  console.log(`${found.length} points around the steps; the first ${once.length} are all that the runs have`)
  return [...once, ...found.filter(one => !once.includes(one))]
}

/** How it dies, and whether who settles it dies as well. */
function withChance(one: KillCase): KillCase {
  const scope = chance(one, 'scope') < 0.5 ? 'process' : 'group'
  const recoverAt = 1 + Math.floor(chance(one, 'recover') * 120)
  return { ...one, scope, ...(recoverAt <= 40 && { recoverAt }) }
}

/** A number from 0 up to 1 that only the seed, the case and the question decide: so a run can be gone on with. */
function chance(one: KillCase, question: string): number {
  return chanceOf(`${seed} ${question} ${nameOf(one)}`)
}

function nameOf({ kind, run, point, nth }: KillCase): string {
  return JSON.stringify([kind, run, point, nth])
}

function seconds(): number {
  return Math.round((Date.now() - startedAt) / 1000)
}
