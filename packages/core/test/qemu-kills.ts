import { expect } from 'vitest'
import { ChainManager } from '../src/chain-manager.ts'
import { isVarveError } from '../src/errors.ts'
import type { BackupStage, VarveEvent } from '../src/events.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { recover } from '../src/recover.ts'
import { MiB, type VmSite } from './vm-site.ts'

/** Kills a process as soon as a backup comes to a stage. */
function killAt(stage: string, pid: number): (event: VarveEvent) => void {
  return event => {
    if (event.type === 'stage' && event.stage === stage) process.kill(pid, 'SIGKILL')
  }
}

/**
 * What comes of the backup after one in which QEMU was killed, by the stage that had just begun. While the overlay is active
 * QEMU has stored the bitmaps of its base; else those that it has open are lost with it.
 */
const NEXT: Record<BackupStage, BackupManifest['kind']> = {
  plan: 'full',
  mark: 'full',
  freeze: 'full',
  export: 'incremental',
  stream: 'incremental',
  upload: 'incremental',
  publish: 'incremental',
  thaw: 'incremental',
  retire: 'full',
}

export const STAGES = Object.keys(NEXT) as readonly BackupStage[]

/** Kills QEMU in one backup after the other: what was flushed stays, and no increment lacks any of it. */
export async function expectSurvives(site: VmSite, stages: readonly BackupStage[]): Promise<void> {
  const { createVm, backup, expectStored } = site
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  let last = await backup()
  let pattern = 0x20
  for (const stage of stages) {
    pattern += 2
    await vm.io('vda', `write -P ${pattern} 1M 2M`)
    const onEvent = killAt(stage, await vm.qemuPid())
    const published = await backup({}, { onEvent }).catch(error => {
      expect(isVarveError(error), String(error)).toBe(true)
    })
    await vm.waitForState('shut off')
    const report = await recover({ stateDir: site.stateDir, storages: [site.storage] })
    expect(report, stage).toMatchObject({ ok: true })
    const newest = (await new ChainManager({ storage: site.storage }).list()).backups.at(-1)?.manifest
    if (published) expect(newest, stage).toEqual(published)
    if (newest && newest.id !== last.id) await expectStored(newest, [`read -P ${pattern} 1M 2M`])
    await vm.start()
    await vm.io('vda', `write -P ${pattern + 1} 2M 2M`)
    last = await backup()
    // It may have been backed up as one that is off.
    const isOver = published?.disks[0]?.fallback === 'bitmap-inconsistent'
    expect(last, stage).toMatchObject({ kind: isOver ? 'incremental' : NEXT[stage] })
    if (last.kind === 'full') expect(last.disks[0], stage).toMatchObject({ fallback: 'bitmap-inconsistent' })
    await expectStored(last, [`read -P ${pattern} 1M 1M`, `read -P ${pattern + 1} 2M 2M`])
    await site.expectCleanHost([`varve-${last.id}`])
  }
}
