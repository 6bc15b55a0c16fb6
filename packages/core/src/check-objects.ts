import { openImage } from '@varve/qcow2'
import { assertListsFit, blockListBytes } from './block-list.ts'
import { BlockDigester, DIGEST_LENGTH } from './digest.ts'
import { download } from './download.ts'
import { type ErrorCode, errorMessage, isVarveError, VarveError } from './errors.ts'
import { loadObject, loadRecorded, otherBytes } from './load-object.ts'
import { imageSize, type ManifestDisk, type ManifestFile, type Qcow2ManifestDisk } from './manifest.ts'
import type { StorageDriver } from './storage.ts'

/** What {@link checkDisk} and {@link checkFile} read from. */
export interface ObjectReader {
  readonly storage: StorageDriver
  /** The folder of the backup that they belong to. */
  readonly folder: string
  /** Keys of objects that are known to be damaged and are not read. */
  readonly skip: ReadonlySet<string | undefined>
  readonly signal: AbortSignal
  /** Is told of every chunk's length. */
  readonly onBytes: (length: number) => void
}

/**
 * Every byte of a disk's objects: the list of digests against the manifest, the image against both, and its
 * header and tables against the manifest. Resolves with all that is damaged.
 */
export async function checkDisk(reader: ObjectReader, disk: ManifestDisk): Promise<VarveError[]> {
  const { storage, folder, skip, signal, onBytes } = reader
  const { root, blockSize } = disk.digest
  const imageKey = `${folder}/${disk.image}`
  const listKey = `${folder}/${disk.blocks}`

  let list: Buffer | undefined
  const listDamages = await collectDamages(async () => {
    if (skip.has(listKey)) return []
    const size = blockListBytes(disk.storedSize, disk.digest)
    assertListsFit(size)
    list = await loadRecorded({ storage, key: listKey, size, blake3: root, signal, onBytes })
    return []
  })
  const imageDamages = await collectDamages(async () => {
    if (skip.has(imageKey)) return []
    const digester = new BlockDigester(blockSize)
    await digestObject(reader, imageKey, disk.storedSize, digester)
    const { digest, blocks } = digester.finish()
    // The root alone says whether the image is whole, so a damaged list does not hide a good image.
    if (digest.root !== root)
      return [list ? otherBlocks(imageKey, blocks, list, blockSize) : otherBytes(imageKey)]
    return disk.format === 'qcow2' ? checkHeader(reader, imageKey, disk) : []
  })
  return [...listDamages, ...imageDamages]
}

/** Every byte of a file that is stored beside the disks. Resolves with what is damaged. */
export async function checkFile(reader: ObjectReader, file: ManifestFile): Promise<VarveError[]> {
  const { storage, folder, skip, signal, onBytes } = reader
  const key = `${folder}/${file.key}`
  return collectDamages(async () => {
    if (skip.has(key)) return []
    await loadRecorded({ storage, ...file, key, signal, onBytes })
    return []
  })
}

/** Reads an object of `size` bytes through a digester. */
export async function digestObject(
  reader: Pick<ObjectReader, 'storage' | 'signal' | 'onBytes'>,
  key: string,
  size: number,
  digester: BlockDigester,
): Promise<void> {
  const { storage, signal, onBytes } = reader
  let received = 0
  await download(
    { storage, key, range: { start: 0, end: size }, signal },
    {
      async write(chunk) {
        digester.update(chunk)
        received += chunk.byteLength
        onBytes(chunk.byteLength)
      },
      restart: () => received,
    },
  )
}

/** What a well-stored image says of itself, against what the manifest says of it. */
async function checkHeader(
  { storage, signal }: ObjectReader,
  key: string,
  disk: Qcow2ManifestDisk,
): Promise<VarveError[]> {
  const file = {
    size: disk.storedSize,
    async read(offset: number, into: Uint8Array): Promise<void> {
      const range = { start: offset, end: offset + into.byteLength }
      into.set(await loadObject({ storage, key, range, signal }))
    },
  }
  const image = await openImage(file, { signal }).catch(error => {
    throw isVarveError(error) ? error : invalidImage(key, errorMessage(error), error)
  })
  const said: [string, unknown, unknown][] = [
    ['virtual size', image.virtualSize, imageSize(disk)],
    ['cluster size', image.clusterSize, disk.clusterSize],
    ['backing file', image.backing?.name, disk.backing],
    ['backing format', image.backing?.format, disk.backing && disk.format],
  ]
  return said.flatMap(([what, image, manifest]) =>
    image === manifest ? [] : [invalidImage(key, `its ${what} is ${image}, the manifest says ${manifest}`)],
  )
}

/** What tells of a damaged object. A storage that is away, or refuses us, has other codes. */
const DAMAGE: ReadonlySet<ErrorCode> = new Set([
  'OBJECT_NOT_FOUND',
  'SIZE_MISMATCH',
  'DIGEST_MISMATCH',
  'IMAGE_INVALID',
  'STORAGE_FAILED',
])

/** A storage that may do the same later, as when it is busy, has told nothing of the object. */
function isDamage(error: unknown): error is VarveError {
  return (
    isVarveError(error) && DAMAGE.has(error.code) && !(error.code === 'STORAGE_FAILED' && error.retryable)
  )
}

/** Runs a check. An error because of a damaged object is a finding; any other ends the verification. */
async function collectDamages(check: () => Promise<VarveError[]>): Promise<VarveError[]> {
  try {
    return await check()
  } catch (error) {
    if (isDamage(error)) return [error]
    throw error
  }
}

function otherBlocks(key: string, blocks: Uint8Array, list: Uint8Array, blockSize: number): VarveError {
  const damaged: number[] = []
  for (let at = 0; at < list.byteLength; at += DIGEST_LENGTH) {
    const end = at + DIGEST_LENGTH
    if (Buffer.compare(blocks.subarray(at, end), list.subarray(at, end)) !== 0)
      damaged.push(at / DIGEST_LENGTH)
  }
  const [first = 0] = damaged
  const offset = first * blockSize
  return new VarveError(
    'DIGEST_MISMATCH',
    `${key} is not what was stored: ${damaged.length} of ${list.byteLength / DIGEST_LENGTH} blocks have another digest, the first at offset ${offset}. Put it back from a copy of the storage, or use another backup.`,
    { context: { key, offset, damagedBlocks: damaged.length } },
  )
}

function invalidImage(key: string, what: string, cause?: unknown): VarveError {
  const message = `${key} is no image of this backup: ${what}. Use another backup.`
  return new VarveError('IMAGE_INVALID', message, { context: { key }, cause })
}
