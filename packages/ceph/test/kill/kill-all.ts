/**
 * Kills runs on RBD images at their points, in an order by a seed, for so many seconds; see docs/reliability.md.
 *
 *   npm run test:torture:rbd -- [--seconds 600] [--seed 1] [--only 'restore in place'] [--replay '<case>']
 */
import { parseArgs } from 'node:util'
import { Random } from '../../../core/test/torture/random.ts'
import { type KillCase, KillCases, RUNS } from './kill-cases.ts'

const { values } = parseArgs({
  options: {
    seconds: { type: 'string', default: '600' },
    seed: { type: 'string', default: '1' },
    only: { type: 'string' },
    replay: { type: 'string' },
  },
})
const seed = Number(values.seed)
const random = new Random(seed)
const deadline = Date.now() + Number(values.seconds) * 1000
await using cases = await KillCases.prepare(seed)

async function allCases(): Promise<KillCase[]> {
  const all: KillCase[] = []
  for (const run of RUNS) {
    if (values.only !== undefined && run !== values.only) continue
    const points = await cases.points(run)
    console.log(`${run}: ${points.length} points`)
    const met = new Map<string, number>()
    for (const point of points) {
      const nth = met.get(point) ?? 0
      met.set(point, nth + 1)
      all.push({ run, point, nth, scope: random.pick(['process', 'group']) })
    }
  }
  // Around the steps of the journal first.
  const rank = ({ point }: KillCase) => (/^(before|after) /.test(point) ? 0 : 1) + random.next() / 2
  return all
    .map(one => ({ one, at: rank(one) }))
    .sort((a, b) => a.at - b.at)
    .map(({ one }) => one)
}

/** The steps that only RBD has: a run that does not reach one says so. */
const STEPS = ['suspend', 'rbd-snapshot', 'resumed', 'image-create', 'write-in-place', 'finish']

function assertReached(all: readonly KillCase[]): void {
  const reached = new Set(all.map(({ point }) => point))
  const missed = STEPS.flatMap(step => [`before ${step}`, `after ${step}`]).filter(
    point => !reached.has(point),
  )
  if (missed.length > 0) throw new Error(`No run reaches: ${missed.join(', ')}`)
}

const replay: KillCase | undefined = values.replay && JSON.parse(values.replay)
const all = replay ? [replay] : await allCases()
if (!replay && values.only === undefined) assertReached(all)
let kills = 0
for (const one of all) {
  if (Date.now() > deadline) break
  try {
    if ((await cases.run(one)) && ++kills % 25 === 0) console.log(`${kills} kills survived so far`)
  } catch (error) {
    console.log(`FAILED after ${kills} kills: ${JSON.stringify(one)}`)
    throw error // the next case would begin with what this one left
  }
}
console.log(`${kills} kills survived (seed ${seed}) of ${all.length} cases`)
