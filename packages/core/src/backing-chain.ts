import { open, stat } from 'node:fs/promises'
import { z } from 'zod'
import { runCommand } from './command.ts'
import { isVarveError, VarveError } from './errors.ts'
import { parseOutput } from './parse-output.ts'
import type { RunOptions } from './run-options.ts'

/** One of the images under a disk's own. */
export interface ChainImage {
  /** Its file or block device; of one on the network what QEMU calls it. */
  readonly file: string
  readonly format: string
}

const MAGIC = 0x514649fb // "QFI\xfb"

const chainInfo = z.array(z.object({ filename: z.string(), format: z.string() })).min(1)

/**
 * The images under an image by what their headers say, the nearest first: what a program of QEMU's reads that is given the
 * image alone.
 *
 * @throws DISK_UNSUPPORTED where one of them cannot be opened
 */
export async function headerChain(path: string, format: string, run: RunOptions): Promise<ChainImage[]> {
  if (format === 'qcow2' && (await namesNoBacking(path))) return []
  const args = ['info', '--force-share', '--backing-chain', '--output=json', '-f', format, path]
  const { stdout } = await runCommand('qemu-img', args, run).catch(error => {
    if (!isVarveError(error, 'COMMAND_FAILED')) throw error // such as that of a run that was given up
    throw new VarveError(
      'DISK_UNSUPPORTED',
      `The backing files of ${path} cannot be told: ${error.message}. See that each file that "qemu-img info --backing-chain" names is there and readable.`,
      { context: { path }, cause: error },
    )
  })
  const [, ...below] = parseOutput(chainInfo, stdout, 'qemu-img info')
  return below.map(({ filename, format }) => ({ file: fileOfName(filename), format: formatOf(format) }))
}

/**
 * Whether a qcow2 image says by its header that nothing is under it, as QEMU reads that: one that has no backing file needs
 * no start of a program. False for whatever cannot be told so.
 */
async function namesNoBacking(path: string): Promise<boolean> {
  const header = Buffer.alloc(16)
  try {
    await using file = await open(path)
    const { bytesRead } = await file.read(header, 0, header.length, 0)
    if (bytesRead < header.length) return false
  } catch {
    return false // qemu-img tells why
  }
  const [magic, version] = [header.readUInt32BE(0), header.readUInt32BE(4)]
  return magic === MAGIC && (version === 2 || version === 3) && header.readBigUInt64BE(8) === 0n
}

/** QEMU's drivers of the places where images are, and not of formats; see its "QMP Reference Manual", BlockdevDriver. */
const PLACES = new Set(
  'file host_device host_cdrom nbd rbd iscsi nfs nvme ssh gluster http https ftp ftps'.split(' '),
)

/**
 * The format of an image by the driver that reads it. A raw one may have that of its place alone: libvirt gives no other
 * from 10.1 on, where QEMU is 9.0 or newer, and the header of an image on top may name it so.
 */
export function formatOf(driver: string): string {
  return PLACES.has(driver) ? 'raw' : driver
}

/** A block node as QEMU writes it into a name; see its "QMP Reference Manual", BlockdevOptions. */
interface NodeName {
  filename?: string | undefined
  offset?: unknown
  size?: unknown
  file?: NodeName | undefined
  driver?: string | undefined
  pool?: string | undefined
  namespace?: string | undefined
  image?: string | undefined
  snapshot?: string | undefined
  conf?: string | undefined
  server?: readonly { host: string; port: string }[] | undefined
}
const nodeName: z.ZodType<NodeName> = z.object({
  filename: z.string().optional(),
  offset: z.unknown().optional(),
  size: z.unknown().optional(),
  file: z.lazy(() => nodeName).optional(),
  driver: z.string().optional(),
  pool: z.string().optional(),
  namespace: z.string().optional(),
  image: z.string().optional(),
  snapshot: z.string().optional(),
  conf: z.string().optional(),
  server: z.array(z.object({ host: z.string(), port: z.string() })).optional(),
})

/**
 * The file that a block node is on. QEMU names it so, unless the node differs from what the file alone would give: then
 * it writes `json:` and all that it was given, such as the backing file where the header names another, or a relative
 * one. What is only a part of a file keeps that name. An RBD image has none but `json:`, with more or less in it: it is told
 * by its place and by how its cluster is reached.
 */
export function fileOfName(name: string): string {
  if (!name.startsWith('json:')) return name
  let node = parseNode(name.slice('json:'.length))
  while (node?.file && node.offset === undefined && node.size === undefined) node = node.file
  return node?.filename ?? (node && rbdName(node)) ?? name
}

/** In the words of QEMU's driver. The user is left out: whoever asks, the image is the same. */
function rbdName(node: NodeName): string | undefined {
  const { driver, pool, namespace, image, snapshot, conf, server } = node
  if (driver !== 'rbd' || pool === undefined || image === undefined) return undefined
  const place = [pool, ...(namespace ? [namespace] : []), image].join('/')
  const monitors = server?.map(({ host, port }) => `${host}:${port}`).sort()
  return [
    `rbd:${place}${snapshot ? `@${snapshot}` : ''}`,
    ...(conf === undefined ? [] : [`conf=${conf}`]),
    ...(monitors ? [`mon_host=${monitors.join(';')}`] : []),
  ].join(':')
}

/** Undefined where QEMU has cut the name off. */
function parseNode(text: string): NodeName | undefined {
  try {
    return nodeName.parse(JSON.parse(text))
  } catch {
    return undefined
  }
}

/** Two ways to tell the images under a disk. */
export interface ChainComparison {
  readonly instance: string
  readonly disk: string
  /** The disk's own image. */
  readonly path: string
  /** What the instance reads, or will once it is started. */
  readonly given: readonly ChainImage[]
  /** What the headers say, and so a backup reads. */
  readonly named: readonly ChainImage[]
}

/**
 * Refuses a disk that has other images under it for its instance than by their headers: a backup would hold what the guest
 * never sees. Files are compared, and not their names.
 *
 * @throws DISK_UNSUPPORTED
 */
export async function assertSameChain({
  instance,
  disk,
  path,
  given,
  named,
}: ChainComparison): Promise<void> {
  for (let level = 0; level < Math.max(given.length, named.length); level++) {
    const [one, other] = [given[level], named[level]]
    if (one && other && one.format === other.format && (await isSameFile(one.file, other.file))) continue
    const above = named[level - 1]?.file ?? path
    throw new VarveError(
      'DISK_UNSUPPORTED',
      `The disk ${disk} of ${instance} cannot be backed up: the backing file of ${above} is ${imageText(one)} for the instance, by its definition or by what QEMU was started with, and ${imageText(other)} by the image itself, so a backup would not hold what the guest reads. While the instance is off, make both name what it is to read: the image by "qemu-img rebase -u -f qcow2 -F FORMAT -b FILE ${above}", the definition by "virsh edit" (<backingStore>; without one the image decides). Then take a full backup.`,
      { context: { instance, disk, path: above, given: one?.file, named: other?.file } },
    )
  }
}

function imageText(image: ChainImage | undefined): string {
  return image ? `${image.file} (${image.format})` : 'none'
}

async function isSameFile(one: string, other: string): Promise<boolean> {
  if (one === other) return true
  const [identity, otherIdentity] = await Promise.all([one, other].map(identityOf))
  return identity !== undefined && identity === otherIdentity
}

/** What a file has under each of its names; undefined where a name is none of a file, whatever the system says of it. */
async function identityOf(path: string): Promise<string | undefined> {
  const found = await stat(path, { bigint: true }).catch(() => undefined)
  if (found?.isBlockDevice()) return `device ${found.rdev}`
  return found && `${found.dev} ${found.ino}`
}
