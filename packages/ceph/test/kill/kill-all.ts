/**
 * Kills runs on instances with RBD images at their points, in an order that the seed alone decides, for so many seconds;
 * see docs/reliability.md. Says where to go on.
 *
 *   npm run test:torture:rbd -- [--seconds 600] [--seed 1] [--from 0] [--only 'restore in place (domain)'] [--replay '<case>']
 */
import { createHash } from 'node:crypto'
import { parseArgs } from 'node:util'
import { errorMessage } from '../../../core/src/errors.ts'
import { type KillCase, KillCases } from './kill-cases.ts'
import { RUNS, stepsWithoutARun } from './kill-runs.ts'

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
let cases = await KillCases.prepare(seed)

const without = stepsWithoutARun()
if (without.length > 0) throw new Error(`No run has the steps ${without.join(', ')}`)
const replay: KillCase | undefined = values.replay && JSON.parse(values.replay)
const all = replay ? [replay] : await allCases()
const from = Number(values.from)
let next = from
let [kills, failures] = [0, 0]
while (next < all.length && Date.now() < deadline) {
  const one = all[next++]
  if (!one) break
  try {
    if (await cases.run(one)) kills++
  } catch (error) {
    failures++
    console.log(`FAILED: ${errorMessage(error)}`)
    if (error instanceof Error && error.cause) console.log(`  ${errorMessage(error.cause)}`)
    console.log(`  npm run test:torture:rbd -- --replay '${JSON.stringify(one)}'`)
    // The next case would begin with what this one left.
    await cases[Symbol.asyncDispose]()
    cases = await KillCases.prepare(seed)
  }
  if ((next - from) % 25 === 0)
    console.log(`${next} of ${all.length}; ${kills} kills survived; ${seconds()} s`)
}
await cases[Symbol.asyncDispose]()
console.log(
  `points ${from} to ${next} of ${all.length}: ${kills} kills survived, ${failures} failed, in ${seconds()} s (seed ${seed})`,
)
if (next < all.length) console.log(`to go on: --seed ${seed} --from ${next}`)
process.exitCode = failures > 0 ? 1 : 0

/** Around the steps of the journal first. */
async function allCases(): Promise<KillCase[]> {
  const found: KillCase[] = []
  for (const run of RUNS) {
    const title = `${run.name} (${run.kind})`
    if (!title.includes(values.only)) continue
    const points = await cases.points(run)
    const met = new Map<string, number>()
    for (const point of points) {
      const nth = met.get(point) ?? 0
      met.set(point, nth + 1)
      found.push(withChance({ kind: run.kind, run: run.name, point, nth, scope: 'process' }))
    }
    console.log(`${title}: ${points.length} points`)
  }
  console.log(`${found.length} points, known after ${seconds()} s.`)
  const rank = (one: KillCase) => (/^(before|after) /.test(one.point) ? 0 : 1) + chance(one, 'order')
  return found
    .map(one => ({ one, at: rank(one) }))
    .sort((a, b) => a.at - b.at)
    .map(({ one }) => one)
}

/** How it dies, and whether who settles it dies as well. */
function withChance(one: KillCase): KillCase {
  const scope = chance(one, 'scope') < 0.5 ? 'process' : 'group'
  const recoverAt = 1 + Math.floor(chance(one, 'recover') * 120)
  return { ...one, scope, ...(recoverAt <= 40 && { recoverAt }) }
}

/** A number from 0 up to 1 that only the seed, the case and the question decide: so a run can be gone on with. */
function chance({ kind, run, point, nth }: KillCase, question: string): number {
  const text = JSON.stringify([seed, kind, run, point, nth, question])
  return createHash('sha256').update(text).digest().readUInt32LE() / 2 ** 32
}

function seconds(): number {
  return Math.round((Date.now() - startedAt) / 1000)
}
