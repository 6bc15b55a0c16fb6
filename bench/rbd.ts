import { mkdir, rm } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { type CephLab, startCeph } from '@varve/testkit/lab'
import { execa } from 'execa'
import type { Setting } from './cases.ts'
import { createRaw } from './disk-data.ts'
import { alternate, type Run, runTask, timeCommand } from './measure.ts'

const MIB = 1024 * 1024
const MOST_BYTES = 384 * MIB
/** Less: the cluster keeps everything in memory, and a whole object for each that changes after a snapshot. */
const MOST_CHAIN_BYTES = 128 * MIB
const CAPACITY = 8192 * MIB
const LAYERS = 10

/** Runs of Varve (a) and of the programs of Ceph and rclone (b). */
type Pairs = { a: Run[]; b: Run[] }

/**
 * Full backups of an RBD image that is written all over, and of a large one, and restores of a chain of ten, on a one-node
 * cluster.
 */
export async function measureRbd({ folder, pairs, dataBytes }: Setting): Promise<{
  bytes: number
  toFolder: Pairs
  throughRclone: Pairs
  /** Of `dataBytes`: what a backup costs whatever its size shows less. */
  largeToFolder: Pairs
  chain: Pairs
}> {
  const bytes = Math.min(dataBytes, MOST_BYTES)
  await using ceph = await startCeph({ capacity: CAPACITY })
  await ceph.createRbdPool('bench')
  const { user, keyring } = await ceph.createUser('bench')
  const options = { conf: ceph.conf, user, keyring }
  const [image, large] = ['bench/disk', 'bench/large']
  await create(ceph, image, bytes, folder)

  const at = { stateDir: join(folder, 'state'), ceph: options }
  const target = join(folder, 'peer')
  const script = `set -o pipefail; rbd --conf "$1" export --no-progress "$2" - | rclone rcat "$3"`
  const peer = (image: string) => async () => {
    const run = await timeCommand('bash', ['-c', script, 'bash', ceph.conf, image, target])
    await rm(target)
    return run
  }
  const varve = (image: string, more: object, place: string) => async () => {
    const run = await runTask('backup', { ...at, ...more, disk: `rbd:${image}`, type: 'full' })
    await rm(place, { recursive: true })
    return run
  }
  const local = join(folder, 'local')
  const toFolder = await alternate(pairs, varve(image, { storage: local }, local), peer(image))
  const remote = join(folder, 'remote')
  await mkdir(remote)
  const rclone = { remoteName: 'bench', remotes: { bench: { type: 'alias', remote } } }
  const throughRclone = await alternate(pairs, varve(image, { rclone }, join(remote, 'bench')), peer(image))
  await create(ceph, large, dataBytes, folder)
  const largeToFolder = await alternate(pairs, varve(large, { storage: local }, local), peer(large))
  await remove(ceph, large)
  return {
    bytes,
    toFolder,
    throughRclone,
    largeToFolder,
    chain: await measureChain(ceph, { ...at, storage: local }, Math.min(bytes, MOST_CHAIN_BYTES), pairs),
  }
}

/** Restores to a new image, which is removed each time. */
async function measureChain(
  ceph: CephLab,
  place: { storage: string; stateDir: string; ceph: object },
  bytes: number,
  pairs: number,
): Promise<Pairs> {
  const image = 'bench/chain'
  const at = { ...place, disk: `rbd:${image}` }
  await create(ceph, image, bytes, dirname(place.storage))
  const manifests: (Run & Record<string, unknown>)[] = []
  for (let layer = 0; layer < LAYERS; layer++) {
    if (layer > 0) await rewriteOnePercent(ceph, image, bytes, layer)
    manifests.push(await runTask('backup', { ...at, type: layer === 0 ? 'full' : 'incremental' }))
  }
  const newest = String(manifests.at(-1)?.id)
  const streams = manifests.map(({ chain, id }) =>
    join(at.storage, 'bench', String(chain), String(id), 'vda.rbd-diff'),
  )
  const removed = async (run: Run, name: string) => {
    await remove(ceph, name)
    return run
  }
  const script = `set -e; conf=$1; image=$2; shift 2
    rbd --conf "$conf" create --size 1 "$image"
    for stream; do rbd --conf "$conf" import-diff --no-progress "$stream" "$image"; done`
  return alternate(
    pairs,
    async () => {
      const run = await runTask('restore', { ...at, backup: newest, target: 'rbd:bench/restored' })
      return removed(run, 'bench/restored')
    },
    async () => {
      const run = await timeCommand('bash', ['-c', script, 'bash', ceph.conf, 'bench/imported', ...streams])
      return removed(run, 'bench/imported')
    },
  )
}

/** One cluster of 64 KiB in each hundred, another one for each layer. */
async function rewriteOnePercent(ceph: CephLab, image: string, bytes: number, layer: number): Promise<void> {
  const cluster = 64 * 1024
  const commands: string[] = []
  for (let at = layer * 7 * cluster; at < bytes; at += 100 * cluster)
    commands.push('-c', `write -P ${layer} ${at} ${cluster}`)
  await execa('qemu-io', ['-f', 'raw', ...commands, `rbd:${image}:conf=${ceph.conf}`])
}

async function remove(ceph: CephLab, image: string): Promise<void> {
  await ceph.run('rbd', 'snap', 'purge', '--no-progress', image)
  await ceph.run('rbd', 'rm', '--no-progress', image)
}

/** An image that is written all over. */
async function create(ceph: CephLab, image: string, bytes: number, folder: string): Promise<void> {
  await ceph.run('rbd', 'create', '--size', `${bytes}B`, image)
  const file = join(folder, 'raw')
  await createRaw(file, bytes)
  await execa('qemu-img', [
    ...['convert', '-n', '-f', 'raw', '-O', 'raw'],
    ...[file, `rbd:${image}:conf=${ceph.conf}`],
  ])
  await rm(file)
}
