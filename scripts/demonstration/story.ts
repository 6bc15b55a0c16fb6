import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import {
  type BackupManifest,
  BackupPipeline,
  ChainManager,
  RestorePipeline,
  type RestoreRequest,
  type RestoreResult,
} from '@varve/core'
import { compareImages, sha256Content } from '@varve/testkit/lab'
import { formatSize } from '../../packages/cli/src/size-text.ts'
import { formatDuration } from '../../packages/cli/src/time-text.ts'
import type { Screen } from './screen.ts'
import type { Store } from './store.ts'
import type { Subject } from './subject.ts'
import { printSummary, type Row } from './summary.ts'

/** What {@link tellStory} needs. */
export interface StoryOptions {
  readonly subject: Subject
  readonly store: Store
  /** For everything that is written. */
  readonly folder: string
  readonly screen: Screen
  readonly signal: AbortSignal
}

/** Backs up, restores and proves. Throws at the first thing that is not as it should be. */
export async function tellStory({ subject, store, folder, screen, signal }: StoryOptions): Promise<void> {
  const { host, instance, source, titles } = subject
  const rows: Row[] = []
  const proofs: string[] = []
  const storage = store.driver
  const stateDir = join(folder, 'state')
  const chains = new ChainManager({ storage })

  const backup = async (what: string, type: 'full' | 'incremental'): Promise<BackupManifest> => {
    const pipeline = new BackupPipeline({ host, storage, stateDir })
    const { result, seconds } = await subject.during(() =>
      screen.withBars(onEvent => pipeline.run({ instance, type }, { signal, onEvent })),
    )
    assert(result.kind === type, `The backup is ${result.kind} instead of ${type}.`)
    const bytes = sum(result.disks.map(disk => disk.storedSize))
    rows.push({ what, kind: type, disks: diskBytes(result), bytes, seconds })
    screen.print(`      ${result.id}: ${formatSize(bytes)} stored in ${formatDuration(seconds)}`)
    return result
  }
  const restore = async (what: string, request: RestoreRequest): Promise<RestoreResult> => {
    const pipeline = new RestorePipeline({ host, storage, stateDir })
    const { result, seconds } = await screen.withBars(onEvent => pipeline.run(request, { signal, onEvent }))
    const bytes = sum(result.disks.map(disk => disk.bytesWritten))
    const disks = sum(result.disks.map(disk => disk.virtualSize))
    rows.push({ what, kind: 'restore', disks, bytes, seconds })
    screen.print(`      ${formatSize(bytes)} written in ${formatDuration(seconds)}`)
    return result
  }

  screen.act(titles.prepare)
  await subject.prepare()

  screen.act(titles.full)
  await backup('First backup', 'full')

  screen.act(titles.change)
  await subject.change(1)
  screen.act('Incremental backup: only what changed')
  await backup('Second backup', 'incremental')

  screen.act(`${titles.change}, once more`)
  await subject.change(2)
  const wanted = await screen.step('SHA-256 of vda before the backup', () => subject.sum())
  screen.note(wanted)
  screen.act('Incremental backup')
  const last = await backup('Third backup', 'incremental')

  screen.act('Restore the last backup to new images')
  const restored = Object.fromEntries(last.disks.map(({ name }) => [name, source.path(`new-${name}`)]))
  await restore('To new images', { backup: last.id, to: { disks: restored } })
  await screen.step('SHA-256 of the restored vda', async () => {
    for (const { name } of last.disks) await source.check(`new-${name}`)
    const { path, format } = source.open('new-vda')
    const found = await sha256Content(path, format)
    assert(found === wanted, `The restored vda has the SHA-256 ${found}, not ${wanted}.`)
  })
  proofs.push(`the restored vda has the SHA-256 from before its backup, ${wanted.slice(0, 16)}…`)
  proofs.push(...(await subject.proveOthers()))

  const tool = source.plainTool
  screen.act(`Restore without Varve: plain ${tool} on the stored files`)
  const files = await screen.step(`The files, as they are on ${store.title}`, () => store.files())
  const folders = (await chains.resolve(last.id)).map(backup => join(files, backup.folder))
  for (const { name } of last.disks) {
    const plain = `plain-${name}`
    await screen.step(`${tool} of ${name}, whose chain is of ${folders.length} backups`, async () => {
      await source.restorePlainly(name, folders, plain, signal)
      const { identical, message } = await compareImages(source.open(plain), source.open(`new-${name}`))
      assert(identical, `${tool} and Varve restored ${name} differently: ${message}`)
    })
  }
  proofs.push(`${tool} of the stored chain and Varve restore the same: qemu-img compare`)

  screen.act('Verify: read every stored byte and compare it with its digest')
  let verified = 0
  const startedAt = performance.now()
  const { result: report, seconds } = await screen.withBars(onEvent =>
    chains.verify(last.id, {
      deep: true,
      signal,
      onProgress: ({ bytesDone, bytesTotal }) => {
        verified = bytesDone
        const bytesPerSecond = (bytesDone / (performance.now() - startedAt)) * 1000
        const secondsLeft = (bytesTotal - bytesDone) / Math.max(1, bytesPerSecond)
        const percent = (bytesDone / Math.max(1, bytesTotal)) * 100
        onEvent({
          type: 'progress',
          disk: 'all',
          bytesDone,
          bytesTotal,
          percent,
          bytesPerSecond,
          secondsLeft,
        })
      },
    }),
  )
  assert(report.ok, report.problems.map(({ message }) => message).join('\n'))
  rows.push({ what: 'The chain', kind: 'verify', disks: diskBytes(last), bytes: verified, seconds })
  proofs.push(`the ${report.chain.length} backups of the chain are whole: every byte has its BLAKE3 digest`)

  screen.act(titles.ruin)
  await subject.ruin()
  screen.act(titles.restore)
  await restore('Over the instance', { backup: last.id, to: { instance }, powerOffTimeoutMs: 30_000 })
  proofs.push(...(await subject.proveRestored(wanted)))

  screen.act('The chain goes on: the next backup is an increment again')
  await subject.change(3)
  const next = await backup('After the restore', 'incremental')
  assert(next.parent === last.id, `The backup rests on ${next.parent} instead of ${last.id}.`)
  const left = await leftovers(folder, subject)
  assert(left.length === 0, `Left over: ${left.join(', ')}.`)
  proofs.push('after a restore the chain goes on, and no overlay, bitmap, snapshot or journal is left over')

  printSummary(screen, rows, proofs)
}

/** What a run should have removed. */
async function leftovers(folder: string, { host, instance, source }: Subject): Promise<string[]> {
  const files = (await readdir(folder, { recursive: true })).filter(name => /\.varve-|\.jsonl$/.test(name))
  const { disks } = await host.instance(instance)
  const bitmaps = disks.flatMap(disk =>
    disk.format === 'rbd' ? [] : disk.bitmaps.slice(1).map(({ name }) => `${disk.name} ${name}`),
  )
  return [...files, ...bitmaps, ...(await source.leftovers())]
}

/** @throws where something is not as it should be */
export function assert(condition: boolean, message: string): asserts condition {
  if (!condition) throw new Error(`NOT PROVED. ${message}`)
}

function diskBytes(manifest: BackupManifest): number {
  return sum(manifest.disks.map(disk => disk.virtualSize))
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((total, number) => total + number, 0)
}
