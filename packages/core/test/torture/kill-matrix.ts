import type { LibvirtLab } from '@varve/testkit/lab'
import { JOURNAL_STEPS, type JournalStepName } from '../../src/journal.ts'
import type { Bundle } from '../bundle.ts'
import { type CaseResult, findPoints, type KillCase, runKillCase } from './kill-case.ts'
import { ProvingGround } from './proving-ground.ts'
import { type Prepared, prepareTemplates, SCENARIOS, type Scenario } from './scenarios.ts'
import { bundleVictim, Victims } from './victims.ts'

interface Place {
  readonly ground: ProvingGround
  readonly victims: Victims
  readonly prepared: Prepared
}

/** Runs kill cases: those of plain images, and those of a domain of the lab's. */
export class KillMatrix implements AsyncDisposable {
  readonly #program: Bundle
  readonly #images: Place
  readonly #domain: Place | undefined

  private constructor(program: Bundle, images: Place, domain: Place | undefined) {
    this.#program = program
    this.#images = images
    this.#domain = domain
  }

  /**
   * @param lab for the cases of domains; those of images need none
   * @param scenarios those that there are cases of. Default: all
   */
  static async prepare(
    lab: LibvirtLab | undefined,
    scenarios: readonly Scenario[] = SCENARIOS,
  ): Promise<KillMatrix> {
    const images = scenarios.filter(({ instance }) => instance === 'images')
    const ofDomains = scenarios.filter(({ instance }) => instance !== 'images')
    const program = await bundleVictim()
    const domain = lab && (await preparePlace(program, ofDomains, lab))
    return new KillMatrix(program, await preparePlace(program, images), domain)
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
    await this.#program[Symbol.asyncDispose]()
  }
}

/**
 * Steps that no scenario here reaches, as they need a Ceph cluster: those of RBD images, and of a guest that stands still
 * while they are frozen; packages/ceph/test/kill has them. A new step does not belong here, but in a scenario.
 */
export const WITHOUT_A_CASE: readonly JournalStepName[] = [
  'suspend',
  'rbd-snapshot',
  'resumed',
  'image-create',
]

/** What is recorded only after a run that died, where a merge begins anew; vm-mishaps.lab.test.ts has it. */
const AFTER_A_DEATH: readonly JournalStepName[] = ['unmerged']

/** The steps that a journal may hold, and no scenario records. */
export function stepsWithoutACase(): JournalStepName[] {
  const known = new Set([...SCENARIOS.flatMap(({ steps }) => steps), ...WITHOUT_A_CASE, ...AFTER_A_DEATH])
  return JOURNAL_STEPS.filter(step => !known.has(step))
}

/** What a scenario is called on the command line. */
export function scenarioOf(name: string): Scenario {
  const scenario = SCENARIOS.find(one => one.name === name)
  if (!scenario) throw new Error(`There is no scenario "${name}".`)
  return scenario
}

async function preparePlace(
  program: Bundle,
  scenarios: readonly Scenario[],
  lab?: LibvirtLab,
): Promise<Place> {
  const ground = await ProvingGround.create(lab)
  const victims = await Victims.prepare(ground.temporary, program)
  return { ground, victims, prepared: await prepareTemplates(ground, scenarios) }
}
