import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import {
  abortError,
  backupOfMark,
  type ImageState,
  isVarveError,
  programVersion,
  type RbdCluster,
  type RbdDiffStream,
  type RbdExport,
  type RbdImage,
  type RbdSnapshot,
  type RunOptions,
  VarveError,
} from '@varve/core'
import {
  type CephConnection,
  connectionArguments,
  connectionEnvironment,
  keyringText,
  qemuFileName,
} from './connection.ts'
import { exportDiff } from './export-diff.ts'
import {
  type ImageInfo,
  type ImageLayout,
  type ListedSnapshot,
  parseClones,
  parseInfo,
  parseMetadata,
  parseNames,
  parseSnapshots,
  parseWatchers,
} from './image-info.ts'
import { checkedSnapshot, imageArguments, parseImageName } from './image-name.ts'
import { Rbd } from './rbd.ts'

/** The features that an image can be made with; Ceph sets the others itself. */
const FEATURES = ['layering', 'exclusive-lock', 'object-map', 'fast-diff', 'deep-flatten', 'journaling']

/** Varve's own metadata of an image. */
const METADATA = 'varve.'

/** A cluster, by the `rbd` program. */
export class CephCluster implements RbdCluster {
  readonly #connection: CephConnection
  readonly #rbd: Rbd

  get address(): string {
    const { monitors, conf = 'ceph.conf' } = this.#connection
    return monitors === undefined ? conf : [...monitors].sort().join(',')
  }

  constructor(connection: CephConnection) {
    this.#connection = connection
    this.#rbd = new Rbd(connection)
  }

  async version(run: RunOptions = {}): Promise<string> {
    return programVersion('rbd', run)
  }

  async image(image: string, run: RunOptions = {}): Promise<RbdImage> {
    const [{ id, size, flags, group, mirrored }, snapshots, metadata] = await Promise.all([
      this.#info(image, run),
      this.snapshots(image, run),
      this.#metadata(image, run),
    ])
    return {
      id,
      size,
      snapshots,
      metadata: new Map([...metadata].filter(([key]) => key.startsWith(METADATA))),
      objectMapInvalid: flags.includes('object map invalid'),
      ...(group !== undefined && { group }),
      ...(mirrored && { mirrored }),
    }
  }

  async imageId(image: string, run: RunOptions = {}): Promise<string | undefined> {
    return this.#info(image, run).then(
      ({ id }) => id,
      error => {
        if (isVarveError(error, 'DISK_NOT_FOUND') || isVarveError(error, 'CEPH_POOL_NOT_FOUND'))
          return undefined
        throw error
      },
    )
  }

  async imageState(image: string, run: RunOptions = {}): Promise<ImageState> {
    const { id, writtenAt } = await this.#info(image, run)
    return { id, ...(writtenAt !== undefined && { writtenAt }) }
  }

  async snapshots(image: string, run: RunOptions = {}): Promise<RbdSnapshot[]> {
    return (await this.#snapshots(image, run)).map(({ name, id }) => ({ name, id }))
  }

  async createSnapshot(image: string, snapshot: string, run: RunOptions = {}): Promise<void> {
    // Without the signal: QEMU may carry out later what an rbd that was ended asked it for.
    const { signal: _, ...whole } = run
    await this.#rbd.run(whole, ['snap', 'create', '--no-progress'], { image, snapshot }).catch(error => {
      if (!isVarveError(error, 'TARGET_EXISTS')) throw error
    })
  }

  async removeSnapshots(image: string, snapshots: readonly string[], run: RunOptions = {}): Promise<void> {
    for (const snapshot of snapshots) {
      const removal = this.#rbd.run(run, ['snap', 'rm', '--no-progress'], { image, snapshot, isLong: true })
      await removal.catch(error => {
        if (!isVarveError(error, 'RBD_SNAPSHOT_NOT_FOUND') && !isVarveError(error, 'DISK_NOT_FOUND'))
          throw error
      })
    }
  }

  exportDiff(image: string, { snapshot, from }: RbdExport, run: RunOptions = {}): RbdDiffStream {
    if (run.signal?.aborted) throw abortError(run.signal)
    const args = [
      ...['export-diff', '--no-progress'],
      ...imageArguments(image, snapshot),
      ...(from === undefined ? [] : [`--from-snap=${checkedSnapshot(from)}`]),
      '--path=-',
      ...connectionArguments(this.#connection),
    ]
    const env = connectionEnvironment(this.#connection)
    return exportDiff({ ...run, args, env, image, snapshot, from })
  }

  async imagesBeside(image: string, run: RunOptions = {}): Promise<string[]> {
    const pool = image.slice(0, image.lastIndexOf('/'))
    const names = parseNames(await this.#rbd.json(run, ['ls'], { image, isPool: true }))
    return names.map(name => `${pool}/${name}`)
  }

  async clones(image: string, run: RunOptions = {}): Promise<string[]> {
    return parseClones(await this.#rbd.json(run, ['children', '--all'], { image })) // those in the trash too
  }

  async isOpen(image: string, run: RunOptions = {}): Promise<boolean> {
    return parseWatchers(await this.#rbd.json(run, ['status'], { image })) > 0
  }

  async createImage(
    image: string,
    { size, like }: { size: number; like?: string },
    run: RunOptions = {},
  ): Promise<void> {
    const { layout } = like === undefined ? {} : await this.#info(like, run)
    const more = [`--size=${size}B`, ...(layout === undefined ? [] : layoutArguments(layout))]
    await this.#rbd.run(run, ['create'], { image, more }).catch(async error => {
      if (!isVarveError(error, 'TARGET_EXISTS') || (await this.#info(image, run)).size !== size) throw error
    })
    if (like === undefined) return
    for (const [key, value] of await this.#metadata(like, run)) {
      // keys that begin with "." are Ceph's own, such as the state of mirroring
      if (!key.startsWith(METADATA) && !key.startsWith('.')) await this.setMetadata(image, key, value, run)
    }
  }

  async renameImage(from: string, to: string, run: RunOptions = {}): Promise<void> {
    const [{ pool, namespace, image: _ }, target] = [parseImageName(from), parseImageName(to)]
    if (target.pool !== pool || target.namespace !== namespace) {
      throw new VarveError(
        'INVALID_ARGUMENT',
        `An RBD image is renamed within its pool and namespace only: ${from} cannot become ${to}.`,
        { context: { image: from, target: to } },
      )
    }
    const more = [
      `--dest-pool=${pool}`,
      ...(namespace === undefined ? [] : [`--dest-namespace=${namespace}`]),
      `--dest=${target.image}`,
    ]
    await this.#rbd.run(run, ['rename'], { image: from, more, target: to }).catch(async error => {
      if (!isVarveError(error, 'DISK_NOT_FOUND')) throw error
      await this.#info(to, run).catch(() => {
        throw error
      })
    })
  }

  async removeImage(image: string, run: RunOptions = {}): Promise<void> {
    try {
      const snapshots = await this.#snapshots(image, run)
      await this.#assertRemovable(image, snapshots, run)
      const names = snapshots.map(({ name }) => name)
      await this.removeSnapshots(image, names, run)
      await this.#rbd.run(run, ['rm', '--no-progress'], { image, isLong: true })
    } catch (error) {
      if (!isVarveError(error, 'DISK_NOT_FOUND')) throw error
    }
  }

  async setMetadata(image: string, key: string, value: string, run: RunOptions = {}): Promise<void> {
    await this.#rbd.run(run, ['image-meta', 'set'], { image, more: ['--', key, value] })
  }

  async removeMetadata(image: string, keys: readonly string[], run: RunOptions = {}): Promise<void> {
    const present = await this.#metadata(image, run).catch(error => {
      if (isVarveError(error, 'DISK_NOT_FOUND')) return new Map()
      throw error
    })
    for (const key of keys) {
      if (present.has(key)) await this.#rbd.run(run, ['image-meta', 'remove'], { image, more: ['--', key] })
    }
  }

  async rollback(image: string, snapshot: string, run: RunOptions = {}): Promise<void> {
    await this.#rbd.run(run, ['snap', 'rollback', '--no-progress'], { image, snapshot, isLong: true })
  }

  async fileName(image: string, folder: string): Promise<string> {
    const { pool, namespace, image: name } = parseImageName(image)
    const names = namespace === undefined ? [pool, name] : [pool, namespace, name]
    const { key, keyring } = this.#connection
    if (key === undefined) return qemuFileName(names, this.#connection, keyring)
    const file = join(folder, 'keyring')
    await writeFile(file, keyringText(this.#connection, key), { mode: 0o600 })
    return qemuFileName(names, this.#connection, file)
  }

  async #info(image: string, run: RunOptions): Promise<ImageInfo> {
    return parseInfo(await this.#rbd.json(run, ['info'], { image }))
  }

  async #snapshots(image: string, run: RunOptions): Promise<ListedSnapshot[]> {
    return parseSnapshots(await this.#rbd.json(run, ['snap', 'ls'], { image }))
  }

  async #metadata(image: string, run: RunOptions): Promise<Map<string, string>> {
    return parseMetadata(await this.#rbd.json(run, ['image-meta', 'ls'], { image }))
  }

  /** Looks before anything is removed: an image that stays keeps all its snapshots. */
  async #assertRemovable(
    image: string,
    snapshots: readonly ListedSnapshot[],
    run: RunOptions,
  ): Promise<void> {
    const context = { image, snapshots: snapshots.map(({ name }) => name) }
    const foreign = snapshots.find(({ name }) => backupOfMark(name) === undefined)
    if (foreign) {
      throw new VarveError(
        'RBD_FAILED',
        `The RBD image ${image} is not removed, as it has the snapshot ${foreign.name}, which is none of Varve's. Remove the snapshot, then the image.`,
        { context },
      )
    }
    const held = snapshots.find(snapshot => snapshot.protected)
    if (held) {
      throw new VarveError(
        'RBD_SNAPSHOT_PROTECTED',
        `The RBD image ${image} is not removed, as its snapshot ${held.name} is protected: clones rest on it or may. "rbd children ${image}@${held.name}" shows them.`,
        { context },
      )
    }
    // A snapshot that clones of version 2 rest on can be removed, but is kept out of sight, and the image cannot go.
    const [clone] = await this.clones(image, run)
    if (clone !== undefined) {
      throw new VarveError(
        'RBD_SNAPSHOT_PROTECTED',
        `The RBD image ${image} is not removed, as the clone ${clone} rests on it. Flatten the clone (rbd flatten) or remove it, then remove the image.`,
        { context: { ...context, clone } },
      )
    }
    if (await this.isOpen(image, run)) {
      throw new VarveError(
        'DISK_BUSY',
        `The RBD image ${image} is not removed, as a client has it open ("rbd status ${image}" shows where).`,
        { context, retryable: true },
      )
    }
  }
}

function layoutArguments({ features, objectSize, striping, dataPool }: ImageLayout): string[] {
  const made = features.filter(feature => FEATURES.includes(feature))
  return [
    ...(made.length > 0 ? made.map(feature => `--image-feature=${feature}`) : ['--rbd-default-features=0']),
    `--object-size=${objectSize}B`,
    ...(striping ? [`--stripe-unit=${striping.unit}B`, `--stripe-count=${striping.count}`] : []),
    ...(dataPool === undefined ? [] : [`--data-pool=${dataPool}`]),
  ]
}
