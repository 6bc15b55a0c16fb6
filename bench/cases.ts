import { execFile } from 'node:child_process'
import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { NbdClient } from '@varve/nbd'
import { scatterQcow2, startLibvirt } from '@varve/testkit/lab'
import { createDisk, createRaw, rewriteOnePercent, withExport } from './disk-data.ts'
import { alternate, median, type Run, ratio, runTask, timeCommand } from './measure.ts'
import { measureRbd } from './rbd.ts'
import { measureStalls } from './stall.ts'
import { storage } from './storage.ts'

/** Where and how much. */
export interface Setting {
  readonly folder: string
  readonly pairs: number
  readonly diskBytes: number
  readonly dataBytes: number
}

/** A row of the table. */
export interface Figure {
  readonly name: string
  readonly varve?: string
  readonly peer?: string
  readonly value: string
  readonly aim: string
  /** Absent where there is no aim. */
  readonly met?: boolean
  /** Every run behind it. */
  readonly runs: unknown
}

const GiB = 2 ** 30
const seconds = (runs: readonly Run[]) => `${median(runs.map(run => run.seconds)).toFixed(2)} s`
const places = (folder: string, name: string) => ({
  storage: join(folder, name),
  stateDir: join(folder, `${name}-state`),
})

function compared(name: string, runs: { a: Run[]; b: Run[] }, aim: number): Figure {
  const value = ratio(runs)
  return {
    name,
    varve: seconds(runs.a),
    peer: seconds(runs.b),
    value: value.toFixed(2),
    aim: `≤ ${aim}`,
    met: value <= aim,
    runs,
  }
}

async function fullBackup({ folder, pairs, diskBytes, dataBytes }: Setting): Promise<Figure[]> {
  const disk = join(folder, 'disk.qcow2')
  await createDisk(disk, diskBytes, dataBytes)
  const varve = async () => {
    const run = await runTask('backup', { ...places(folder, 'storage'), disk, type: 'full' })
    await rm(join(folder, 'storage'), { recursive: true })
    return run
  }
  const copy = join(folder, 'copy.qcow2')
  const qemuImg = async () => {
    const run = await timeCommand('qemu-img', [
      'convert',
      '-W',
      '-m',
      '16',
      '-f',
      'qcow2',
      '-O',
      'qcow2',
      disk,
      copy,
    ])
    await rm(copy)
    return run
  }
  await varve() // the page cache and the image's first bitmap
  const convert = await alternate(pairs, varve, qemuImg)

  await using lab = await startLibvirt()
  await lab.createDomain({ name: 'bench', disks: [{ target: 'vda', path: disk, format: 'qcow2' }] })
  const output = join(folder, 'virtnbdbackup')
  const virtnbdbackup = async () => {
    // It wants a name and a password for every URI with a socket in it; libvirt asks for neither.
    const login = ['--user', 'none', '--password', 'none']
    const run = await timeCommand('virtnbdbackup', [
      '-U',
      lab.uri,
      ...login,
      '-d',
      'bench',
      '-l',
      'copy',
      '-o',
      output,
    ])
    await rm(output, { recursive: true })
    return run
  }
  const nbdbackup = await alternate(pairs, varve, virtnbdbackup)
  const peak = Math.max(...convert.a.map(run => run.peakMiB ?? Number.NaN))
  return [
    compared('full backup, against qemu-img convert -W -m 16', convert, 0.8),
    compared('full backup, against virtnbdbackup', nbdbackup, 0.2),
    {
      name: `peak memory of that backup (${diskBytes / GiB} GiB disk)`,
      varve: `${peak.toFixed(0)} MiB`,
      value: peak.toFixed(0),
      aim: '≤ 200 MiB',
      met: peak <= 200,
      runs: convert.a,
    },
  ]
}

async function nbdRead({ folder, pairs, dataBytes }: Setting): Promise<Figure[]> {
  const disk = join(folder, 'disk.qcow2')
  await createDisk(disk, dataBytes, dataBytes)
  return withExport(disk, { format: 'qcow2' }, async socketPath => {
    const runs = await alternate(
      pairs + 2,
      () => timeCommand('nbdcopy', ['--', `nbd+unix:///?socket=${socketPath}`, 'null:']),
      () => runTask('nbd-read', { socketPath }),
    )
    const value = ratio(runs)
    const rate = (list: Run[]) =>
      `${(dataBytes / GiB / median(list.map(run => run.seconds))).toFixed(2)} GiB/s`
    return [
      {
        name: 'NBD read, rate against nbdcopy to null:',
        varve: rate(runs.b),
        peer: rate(runs.a),
        value: value.toFixed(2),
        aim: '≥ 0.6',
        met: value >= 0.6,
        runs,
      },
    ]
  })
}

async function increment({ folder, pairs, diskBytes, dataBytes }: Setting): Promise<Figure[]> {
  const disk = join(folder, 'disk.qcow2')
  await createDisk(disk, diskBytes, dataBytes)
  const at = places(folder, 'storage')
  const full = await runTask('backup', { ...at, disk, type: 'full' })
  const rate = Number(full.storedSize) / full.seconds
  const runs = []
  for (let round = 0; round < pairs; round++) {
    await rewriteOnePercent(disk, diskBytes, round)
    const run = await runTask('backup', { ...at, disk, type: 'incremental' })
    if (run.kind !== 'incremental') throw new Error('the backup was no increment')
    const allowed = Number(run.storedSize) / rate + 1
    runs.push({ ...run, allowed })
  }
  const value = median(runs.map(run => run.seconds / run.allowed))
  return [
    {
      name: 'increment of 1 %, against its bytes at full-backup rate plus 1 s',
      varve: seconds(runs),
      peer: `${median(runs.map(run => run.allowed)).toFixed(2)} s`,
      value: value.toFixed(2),
      aim: '< 1.3',
      met: value < 1.3,
      runs: { full, runs },
    },
  ]
}

async function restore({ folder, pairs, diskBytes, dataBytes }: Setting): Promise<Figure[]> {
  const disk = join(folder, 'disk.qcow2')
  await createDisk(disk, diskBytes, dataBytes)
  const at = places(folder, 'storage')
  const ids: string[] = []
  for (let layer = 0; layer < 10; layer++) {
    if (layer > 0) await rewriteOnePercent(disk, diskBytes, 7 * layer)
    const run = await runTask('backup', { ...at, disk, type: layer === 0 ? 'full' : 'incremental' })
    ids.push(String(run.id))
  }
  await rm(disk)
  const target = join(folder, 'restored.qcow2')
  const measure = (backup: string, layers: string) => {
    const image = join(at.storage, 'bench', ids[0] ?? '', backup, 'vda.qcow2')
    const varve = async () => {
      const run = await runTask('restore', { ...at, backup, target })
      await rm(target)
      return run
    }
    const qemuImg = async () => {
      const run = await timeCommand('qemu-img', ['convert', '-f', 'qcow2', '-O', 'qcow2', image, target])
      await rm(target)
      return run
    }
    return alternate(pairs, varve, qemuImg).then(runs =>
      compared(`restore of ${layers}, against qemu-img convert`, runs, 1.0),
    )
  }
  return [await measure(ids[0] ?? '', 'a full backup'), await measure(ids[9] ?? '', 'a chain of ten')]
}

async function memory(setting: Setting): Promise<Figure[]> {
  return [
    await peakOfBackup('1 TiB disk with 40,000 extents', setting, createLarge),
    await peakOfBackup(
      '1.5 GiB disk, each of its 393,216 clusters apart in the file',
      setting,
      createScattered,
    ),
  ]
}

async function peakOfBackup(
  what: string,
  { folder }: Setting,
  create: (path: string) => Promise<void>,
): Promise<Figure> {
  const disk = join(folder, 'vda.qcow2')
  await create(disk)
  const run = await runTask('backup', { ...places(folder, 'storage'), disk, type: 'full' })
  await rm(disk)
  await rm(join(folder, 'storage'), { recursive: true })
  const peak = run.peakMiB ?? Number.NaN
  return {
    name: `peak memory, ${what}`,
    varve: `${peak.toFixed(0)} MiB`,
    value: peak.toFixed(0),
    aim: '≤ 200 MiB',
    met: peak <= 200,
    runs: [run],
  }
}

async function createLarge(disk: string): Promise<void> {
  const size = 2 ** 40
  await promisify(execFile)('qemu-img', ['create', '-q', '-f', 'qcow2', disk, String(size)])
  await withExport(disk, { format: 'qcow2', writable: true }, async socketPath => {
    await using client = await NbdClient.connect({ socketPath })
    const step = Math.floor(size / 20_000 / 65_536) * 65_536
    const cluster = new Uint8Array(65_536).fill(7)
    for (let at = 0; at + step <= size; at += step) await client.write(at, cluster)
  })
}

async function createScattered(disk: string): Promise<void> {
  const raw = `${disk}.raw`
  await createRaw(raw, 1.5 * GiB)
  const options = ['-f', 'raw', '-O', 'qcow2', '-o', 'cluster_size=4k']
  await promisify(execFile)('qemu-img', ['convert', ...options, raw, disk])
  await rm(raw)
  await scatterQcow2(disk)
}

async function planner(): Promise<Figure[]> {
  const file = fileURLToPath(new URL('./planner.ts', import.meta.url))
  const { stdout } = await promisify(execFile)(process.execPath, ['--import', 'tsx', file])
  const results: Record<string, Record<string, number>> = JSON.parse(stdout)
  return Object.entries(results).map(([name, measured]) => {
    const total = (measured.listSeconds ?? 0) + (measured.planSeconds ?? 0) + (measured.metadataSeconds ?? 0)
    const peak = measured.peakMiB ?? Number.NaN
    return {
      name: `planner, ${name}`,
      varve: `${total.toFixed(2)} s, ${peak.toFixed(0)} MiB`,
      value: peak.toFixed(0),
      aim: '≤ 200 MiB',
      met: peak <= 200,
      runs: [measured],
    }
  })
}

async function stall({ folder, pairs }: Setting): Promise<Figure[]> {
  const runs = await measureStalls(folder, pairs * 3)
  const value = median(runs.varve) / median(runs.bare)
  const text = (list: readonly number[]) => `${(median(list) * 1000).toFixed(0)} ms`
  return [
    {
      name: 'longest stall of guest writes, against snapshot and block-commit alone',
      varve: text(runs.varve),
      peer: text(runs.bare),
      value: value.toFixed(2),
      aim: '≤ 1.1',
      met: value <= 1.1,
      runs,
    },
  ]
}

async function rbd(setting: Setting): Promise<Figure[]> {
  const { bytes, toFolder, throughRclone, largeToFolder, chain } = await measureRbd(setting)
  const size = `${(bytes / GiB).toFixed(2)} GiB`
  const large = `${(setting.dataBytes / GiB).toFixed(2)} GiB`
  return [
    compared(`RBD, full to a folder, ${size}, against rbd export | rclone rcat`, toFolder, 1.1),
    compared(`RBD, full through rclone, ${size}, against rbd export | rclone rcat`, throughRclone, 1.1),
    compared(`RBD, full to a folder, ${large}, against rbd export | rclone rcat`, largeToFolder, 1.1),
    compared('RBD, restore of a chain of ten, against rbd import-diff', chain, 0.8),
  ]
}

/** What `--only` chooses from, in the order of running. */
export const cases: Record<string, (setting: Setting) => Promise<Figure[]>> = {
  full: fullBackup,
  nbd: nbdRead,
  increment,
  restore,
  memory,
  planner,
  stall,
  storage,
  rbd,
}
