import type { LibvirtLab } from '@varve/testkit/lab'
import { JOURNAL_STEPS, type JournalStepName } from '../../src/journal.ts'
import { type CaseResult, findPoints, type KillCase, runKillCase } from './kill-case.ts'
import { ProvingGround } from './proving-ground.ts'
import { type Prepared, prepareTemplates, SCENARIOS, type Scenario } from './scenarios.ts'
import { Victims } from './victims.ts'

interface Place {
  readonly ground: ProvingGround
  readonly victims: Victims
  readonly prepared: Prepared
}

/** The points of every scenario, in the order in which its run reaches them. */
export type PointMap = ReadonlyMap<string, readonly string[]>

/** Runs kill cases: those of plain images, and those of a domain of the lab's. */
export class KillMatrix implements AsyncDisposable {
  readonly #images: Place
  readonly #domain: Place | undefined

  private constructor(images: Place, domain: Place | undefined) {
    this.#images = images
    this.#domain = domain
  }

  /** @param lab for the cases of domains; those of images need none */
  static async prepare(lab: LibvirtLab | undefined): Promise<KillMatrix> {
    return new KillMatrix(await preparePlace(), lab && (await preparePlace(lab)))
  }

  run(killCase: KillCase): Promise<CaseResult> {
    const { ground, victims, prepared } = this.#place(killCase.scenario)
    return runKillCase(ground, victims, prepared, killCase)
  }

  /** Runs a scenario without a kill, which must succeed, to learn its points. */
  points(scenario: Scenario): Promise<readonly string[]> {
    const { ground, victims, prepared } = this.#place(scenario)
    return findPoints(ground, victims, prepared, scenario)
  }

  #place(scenario: Scenario): Place {
    const place = scenario.instance === 'images' ? this.#images : this.#domain
    if (!place) throw new Error(`${scenario.name} needs a libvirt`)
    return place
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const place of [this.#images, this.#domain]) {
      await place?.victims[Symbol.asyncDispose]()
      await place?.ground[Symbol.asyncDispose]()
    }
  }
}

/**
 * Steps that no scenario here reaches: those of RBD images and of a guest that stands still while they are frozen, which
 * packages/ceph/test/kill has; and, yet, of a definition that names a backing file. A new step does not belong here, but in a scenario.
 */
const WITHOUT_A_CASE = new Set<JournalStepName>([
  'suspend',
  'rbd-snapshot',
  'resumed',
  'image-create',
  'drop-backing',
])

/** The moments around each step of the journal that no scenario reaches: a step without a case. */
export function unreachedSteps(points: PointMap): string[] {
  const reached = new Set([...points.values()].flat())
  return JOURNAL_STEPS.filter(step => !WITHOUT_A_CASE.has(step))
    .flatMap(step => [`before ${step}`, `after ${step}`])
    .filter(point => !reached.has(point))
}

/** What a scenario is called on the command line. */
export function scenarioOf(name: string): Scenario {
  const scenario = SCENARIOS.find(one => one.name === name)
  if (!scenario) throw new Error(`There is no scenario "${name}".`)
  return scenario
}

async function preparePlace(lab?: LibvirtLab): Promise<Place> {
  const ground = await ProvingGround.create(lab)
  const victims = await Victims.prepare(ground.temporary)
  return { ground, victims, prepared: await prepareTemplates(ground) }
}
