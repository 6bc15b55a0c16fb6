import { type RbdSnapshot, VarveError } from '@varve/core'
import { z } from 'zod'

const size = z.number().int().nonnegative()

const infoShape = z.object({
  id: z.string(),
  size,
  object_size: size,
  features: z.array(z.string()),
  stripe_unit: size.optional(),
  stripe_count: size.optional(),
  data_pool: z.string().optional(),
  flags: z.array(z.string()).default([]),
  group: z.string().optional(),
  mirroring: z.unknown().optional(),
  modify_timestamp: z.string().optional(),
})

const snapshotShape = z.array(z.object({ id: size, name: z.string(), protected: z.enum(['true', 'false']) }))

const metadataShape = z.record(z.string(), z.string())

const namesShape = z.array(z.string())

const clonesShape = z.array(
  z.object({ pool: z.string(), pool_namespace: z.string().default(''), image: z.string() }),
)

const statusShape = z.object({ watchers: z.array(z.unknown()).default([]) })

/** What `rbd info` says of an image. */
export interface ImageInfo {
  /** What tells it from another image that was made under the same name. */
  readonly id: string
  /** In bytes. */
  readonly size: number
  readonly layout: ImageLayout
  /** Such as `object map invalid`. */
  readonly flags: readonly string[]
  /** The group that it is in. */
  readonly group?: string
  /** When it was last written to. */
  readonly writtenAt?: string
  /** Whether it is mirrored to another cluster, or from it. */
  readonly mirrored: boolean
}

/** How the objects of an image are made. */
export interface ImageLayout {
  /** Such as `layering`, `exclusive-lock`, `object-map` and `fast-diff`. */
  readonly features: readonly string[]
  /** The size of an object in bytes, a power of two. */
  readonly objectSize: number
  /** Where its data is spread over several objects at a time: in pieces of so many bytes, over so many objects. */
  readonly striping?: { readonly unit: number; readonly count: number }
  /** The pool of its data, where that is not the image's own. */
  readonly dataPool?: string
}

/** A snapshot, as `rbd snap ls` tells of it. */
export interface ListedSnapshot extends RbdSnapshot {
  /** Whether it is not to be removed since clones may rest on it. */
  readonly protected: boolean
}

/** What `rbd info` printed. @throws RBD_FAILED */
export function parseInfo(json: string): ImageInfo {
  const info = parse('rbd info', infoShape, json)
  const { stripe_unit: unit, stripe_count: count } = info
  return {
    id: info.id,
    size: info.size,
    flags: info.flags,
    mirrored: info.mirroring !== undefined,
    ...(info.modify_timestamp !== undefined && { writtenAt: info.modify_timestamp }),
    ...(info.group !== undefined && { group: info.group }),
    layout: {
      features: info.features,
      objectSize: info.object_size,
      ...(unit !== undefined && count !== undefined && { striping: { unit, count } }),
      ...(info.data_pool !== undefined && { dataPool: info.data_pool }),
    },
  }
}

/** What `rbd snap ls` printed, the oldest first. @throws RBD_FAILED */
export function parseSnapshots(json: string): ListedSnapshot[] {
  const snapshots = parse('rbd snap ls', snapshotShape, json)
  return snapshots.map(({ name, id, protected: isProtected }) => ({
    name,
    id,
    protected: isProtected === 'true',
  }))
}

/** What `rbd image-meta ls` printed. @throws RBD_FAILED */
export function parseMetadata(json: string): Map<string, string> {
  if (json === '') return new Map() // there is none
  return new Map(Object.entries(parse('rbd image-meta ls', metadataShape, json)))
}

/** What `rbd ls` printed. @throws RBD_FAILED */
export function parseNames(json: string): string[] {
  return parse('rbd ls', namesShape, json)
}

/** What `rbd children` printed: each clone as `<pool>/[<namespace>/]<image>`. @throws RBD_FAILED */
export function parseClones(json: string): string[] {
  return parse('rbd children', clonesShape, json).map(({ pool, pool_namespace: namespace, image }) =>
    [pool, ...(namespace === '' ? [] : [namespace]), image].join('/'),
  )
}

/** How many clients have the image open, by what `rbd status` printed. @throws RBD_FAILED */
export function parseWatchers(json: string): number {
  return parse('rbd status', statusShape, json).watchers.length
}

function parse<T>(label: string, shape: z.ZodType<T>, json: string): T {
  try {
    return shape.parse(JSON.parse(json))
  } catch (cause) {
    throw new VarveError(
      'RBD_FAILED',
      `${label} printed what cannot be understood. Is the program rbd that of Ceph 14 or newer?`,
      { context: { stdout: json.slice(0, 1000) }, cause },
    )
  }
}
