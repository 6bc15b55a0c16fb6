// Run as a process of its own under strace: does what users do with storages that an attacker has written to.

import { copyFile, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { BackupPipeline } from '../../src/backup-pipeline.ts'
import { ChainManager } from '../../src/chain-manager.ts'
import { errorMessage, isVarveError } from '../../src/errors.ts'
import type { Instance } from '../../src/host.ts'
import { ImageHost } from '../../src/image-host.ts'
import { recover } from '../../src/recover.ts'
import { RestorePipeline, type RestoreRequest } from '../../src/restore-pipeline.ts'
import { adoptMarks } from '../adopt-marks.ts'
import type { Attempt, Operation, Outcome } from './attempt.ts'

/** An instance that is off and has a definition, as under libvirt. */
class DefinedHost extends ImageHost {
  readonly defined: string[] = []
  readonly #definition: string

  constructor(disk: string, definition: string) {
    super({ instance: 'web-1', disks: { vda: disk } })
    this.#definition = definition
  }

  override async instance(...args: Parameters<ImageHost['instance']>): Promise<Instance> {
    return { ...(await super.instance(...args)), definition: this.#definition }
  }

  override define(xml?: string): Promise<void> {
    this.defined.push(xml ?? '')
    return Promise.resolve()
  }
}

async function attempt({ operation, backup, target, disk, ...given }: Attempt): Promise<unknown> {
  const { storage: path, pristine, definition } = given
  const signal = AbortSignal.timeout(60_000)
  const stateDir = `${target}.state`
  if (operation === 'over' || operation === 'backup') {
    await copyFile(pristine, disk)
    await adoptMarks('vda', disk)
  }
  await using storage = new LocalDriver({ path })
  const chains = new ChainManager({ storage })
  const host = new DefinedHost(disk, definition)
  const restore = async (request: Omit<RestoreRequest, 'backup'>) => {
    await new RestorePipeline({ host, storage, stateDir }).run({ backup, ...request }, { signal })
    return host.defined
  }
  const operations: Record<Operation, () => Promise<unknown>> = {
    list: async () => {
      const { backups, damaged } = await chains.list({ signal })
      return {
        backups: backups.map(({ manifest }) => manifest.id),
        damaged: damaged.map(({ error }) => error.code),
      }
    },
    verify: async () => {
      const { problems } = await chains.verify(backup, { deep: true, signal })
      return problems.map(({ code }) => code)
    },
    restore: () => restore({ to: { disks: { vda: join(target, 'restored.qcow2') } } }),
    over: () => restore({ to: { instance: 'web-1' }, definition: 'restore' }),
    copy: () => restore({ to: { newInstance: 'copy', directory: target } }),
    backup: async () => {
      const pipeline = new BackupPipeline({ host, storage, stateDir })
      const { disks } = await pipeline.run({ instance: 'web-1' }, { signal })
      return disks.map(({ kind, fallback }) => fallback ?? kind)
    },
    recover: async () => (await recover({ stateDir, storages: [storage], host }, { signal })).runs,
    prune: async () =>
      (await chains.prune({ keepLast: 1 }, { signal })).removed.map(({ manifest }) => manifest.id),
    delete: () => chains.delete(backup, { signal }),
  }
  return operations[operation]()
}

const [input = '', output = ''] = process.argv.slice(2)
const outcomes: Outcome[] = []
for (const each of JSON.parse(await readFile(input, 'utf8')) as Attempt[]) {
  const began = performance.now()
  const end = await attempt(each).then(
    result => ({ result }),
    error => ({ code: isVarveError(error) ? error.code : `not typed: ${errorMessage(error)}` }),
  )
  const memory = process.resourceUsage().maxRSS * 1024
  outcomes.push({ ...end, memory, ms: Math.round(performance.now() - began) })
}
await writeFile(output, JSON.stringify(outcomes))
