import { realpath } from 'node:fs/promises'
import { z } from 'zod'
import { type ChainImage, fileOfName, formatOf } from './backing-chain.ts'
import { type FoundBitmap, ownerOf, type Seal, sealOf } from './bitmap-twin.ts'
import { VarveError } from './errors.ts'
import type { BitmapChange } from './host.ts'

/** The parts of QMP's `BlockDeviceInfo` that are used; see QEMU's "QMP Reference Manual", query-named-block-nodes. */
const blockNodes = z.array(
  z.object({
    'node-name': z.string(),
    drv: z.string(),
    file: z.string(),
    image: z.object({
      'virtual-size': z.number().int().nonnegative(),
      'format-specific': z.object({ data: z.object({ compat: z.string().optional() }) }).optional(),
    }),
    'dirty-bitmaps': z
      .array(
        z.object({
          name: z.string().default(''),
          granularity: z.number(),
          /** Bytes, those of whole bits. */
          count: z.number(),
          recording: z.boolean(),
          inconsistent: z.boolean().default(false),
        }),
      )
      .default([]),
  }),
)

/** Of QMP's `ImageInfo`: an image and those under it. */
interface ChainInfo {
  filename: string
  format: string
  'backing-image'?: ChainInfo | undefined
}
const chainInfo: z.ZodType<ChainInfo> = z.object({
  filename: z.string(),
  format: z.string(),
  'backing-image': z.lazy(() => chainInfo).optional(),
})
/** Of QMP's `BlockInfo`; see query-block. A drive without a medium has nothing inserted. */
const blockDevices = z.array(z.object({ inserted: z.object({ image: chainInfo }).optional() }))

/** A block node of a running instance. */
export interface BlockNode {
  readonly name: string
  readonly virtualSize: number
  /** Those of one moment: no write falls between two of them. */
  readonly bitmaps: readonly FoundBitmap[]
  readonly holdsBitmaps: boolean
}

type FoundNode = z.infer<typeof blockNodes>[number]

/** Has QEMU list its block nodes; {@link Qmp} takes the reply. */
export const NODES_QUESTION: string = commandText('query-named-block-nodes', { flat: true })
/** Has QEMU list its drives; {@link DriveChains} takes the reply. */
export const DRIVES_QUESTION: string = commandText('query-block')

/** Sends one command, as JSON, to the monitor of a domain and gives the reply. */
export type Monitor = (json: string) => Promise<string>

/** QEMU's monitor of a running domain, through `virsh qemu-monitor-command`. */
export class Qmp {
  readonly #monitor: Monitor
  readonly #domain: string
  readonly #nodes: readonly FoundNode[]

  private constructor(monitor: Monitor, domain: string, nodes: readonly FoundNode[]) {
    this.#monitor = monitor
    this.#domain = domain
    this.#nodes = nodes
  }

  /** Reads the block nodes. Their state is the one at this moment. */
  static async open(monitor: Monitor, domain: string): Promise<Qmp> {
    return Qmp.of(await monitor(NODES_QUESTION), monitor, domain)
  }

  /** Knows the block nodes from QEMU's reply to {@link NODES_QUESTION}, and their state at that moment. */
  static async of(reply: string, monitor: Monitor, domain: string): Promise<Qmp> {
    const nodes = blockNodes.parse(resultOf(reply, domain, 'query-named-block-nodes'))
    const resolved = nodes.map(async node => {
      return { ...node, file: await resolvedFile(node.file) }
    })
    return new Qmp(monitor, domain, await Promise.all(resolved))
  }

  /** The node of an image by its path, symbolic links resolved, and format. */
  node(path: string, format: string): BlockNode {
    const onFile = this.#nodes.filter(({ file }) => file === path)
    // That of the file alone is below every qcow2 image too.
    const isBare = format === 'raw' && !onFile.some(({ drv }) => drv === 'qcow2')
    const node =
      onFile.find(({ drv }) => drv === format) ??
      (isBare ? onFile.find(({ drv }) => formatOf(drv) === format) : undefined)
    if (!node) throw noNode(this.#domain, path, format)
    return {
      name: node['node-name'],
      virtualSize: node.image['virtual-size'],
      holdsBitmaps: format === 'qcow2' && node.image['format-specific']?.data.compat !== '0.10',
      bitmaps: node['dirty-bitmaps'].map(bitmap => ({
        name: bitmap.name,
        granularity: bitmap.granularity,
        enabled: bitmap.recording,
        inconsistent: bitmap.inconsistent,
        dirty: bitmap.count / bitmap.granularity,
      })),
    }
  }

  /** Whether any node is on this file. */
  uses(path: string): boolean {
    return this.#nodes.some(({ file }) => file === path)
  }

  /** See {@link Host.changeBitmaps}: of all these nodes at one moment, or of none. */
  async changeBitmaps(
    changes: readonly { readonly node: BlockNode; readonly change: BitmapChange }[],
  ): Promise<void> {
    await this.transaction(changes.flatMap(({ node, change }) => changing(node, change)))
  }

  /** Carries out all the actions at one point in time, or none. */
  async transaction(actions: readonly { type: string; data: object }[]): Promise<void> {
    if (actions.length === 0) return
    resultOf(await this.#monitor(commandText('transaction', { actions })), this.#domain, 'transaction')
  }
}

function changing(
  { name: node, bitmaps }: BlockNode,
  { seal: sealed, remove }: BitmapChange,
): { type: string; data: object }[] {
  const seal = sealed === undefined ? undefined : sealOf(sealed, bitmaps)
  const removed = bitmaps.filter(({ name }) => remove.includes(ownerOf(name)))
  return [
    ...(seal ? sealing(node, seal) : []),
    ...removed.map(({ name }) => ({ type: 'block-dirty-bitmap-remove', data: { node, name } })),
  ]
}

function sealing(node: string, { name, from, granularity }: Seal): { type: string; data: object }[] {
  return [
    { type: 'block-dirty-bitmap-add', data: { node, name, granularity, persistent: true, disabled: true } },
    { type: 'block-dirty-bitmap-merge', data: { node, target: name, bitmaps: [from] } },
  ]
}

function noNode(domain: string, path: string, format: string): VarveError {
  return new VarveError(
    'DISK_UNSUPPORTED',
    `QEMU has no block node of ${path} (${format}) in ${domain}: it runs on something else than its definition says. Compare the disks of "virsh dumpxml" with it, and back up the others by their names (--disks), or this one once the instance was started anew.`,
    {
      context: { instance: domain, path, format },
    },
  )
}

/** What the drives of a running domain read, as QEMU says. */
export class DriveChains {
  readonly #domain: string
  /** Of each drive the images, its own first. */
  readonly #chains: readonly (readonly ChainImage[])[]

  private constructor(domain: string, chains: readonly (readonly ChainImage[])[]) {
    this.#domain = domain
    this.#chains = chains
  }

  /** Knows them from QEMU's reply to {@link DRIVES_QUESTION}. */
  static of(reply: string, domain: string): DriveChains {
    const drives = blockDevices.parse(resultOf(reply, domain, 'query-block'))
    return new DriveChains(
      domain,
      drives.map(({ inserted }) => chainOf(inserted?.image)),
    )
  }

  /** The images under one, which is named by its path, symbolic links resolved, and format: the nearest first. */
  async under(path: string, format: string): Promise<readonly ChainImage[]> {
    for (const chain of this.#chains) {
      for (const [level, image] of chain.entries()) {
        if (image.format === format && (await resolvedFile(image.file)) === path)
          return chain.slice(level + 1)
      }
    }
    throw noNode(this.#domain, path, format)
  }
}

/** A filter, as for copy on read, counts as an image. */
function chainOf(image: ChainInfo | undefined): ChainImage[] {
  const chain: ChainImage[] = []
  for (let next = image; next; next = next['backing-image'])
    chain.push({ file: fileOfName(next.filename), format: formatOf(next.format) })
  return chain
}

/** The file of a node, symbolic links resolved; of one on the network it is no path. */
async function resolvedFile(name: string): Promise<string> {
  const file = fileOfName(name)
  return realpath(file).catch(() => file)
}

const monitorReply = z.object({
  return: z.unknown().optional(),
  error: z.object({ class: z.string(), desc: z.string() }).optional(),
})

function commandText(command: string, args: object = {}): string {
  return JSON.stringify({ execute: command, arguments: args })
}

function resultOf(output: string, domain: string, command: string): unknown {
  const reply = monitorReply.parse(JSON.parse(output))
  if (reply.error) {
    throw new VarveError(
      'COMMAND_FAILED',
      `QEMU refused ${command} for ${domain}: ${reply.error.desc}; put that right and try again`,
      {
        context: { instance: domain, command, reason: reply.error.desc },
      },
    )
  }
  return reply.return
}
