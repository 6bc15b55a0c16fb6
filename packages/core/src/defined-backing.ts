import type { Element } from '@xmldom/xmldom'
import { assertSameChain, type ChainImage, headerChain } from './backing-chain.ts'
import { type ImageSource, readDomainXml, readSource } from './domain-xml.ts'
import type { LibvirtDomains } from './libvirt-domains.ts'
import type { RunOptions } from './run-options.ts'
import { child, children, parseDomain } from './xml-elements.ts'

/** The images under a disk that a definition names itself. */
export interface DefinedBacking {
  /** The nearest first. */
  readonly images: readonly DefinedImage[]
  /** Whether it says that nothing is under the last of them. Otherwise that one's header decides. */
  readonly ended: boolean
}

/** Where an image is, and its format. */
export interface DefinedImage extends ImageSource {
  readonly format: string
  /** What QEMU calls it, for an export of an NBD server. */
  readonly nbd?: string
}

/** Reads the `<backingStore>` elements of a disk. QEMU is given what they say, whatever the images say themselves. */
export function readDefinedBacking(xml: string, disk: string): DefinedBacking {
  const { root } = parseDomain(xml)
  const isTheDisk = (element: Element) => child(element, 'target')?.getAttribute('dev') === disk
  const images: DefinedImage[] = []
  let store = child(children(child(root, 'devices'), 'disk').find(isTheDisk), 'backingStore')
  for (; store && child(store, 'source'); store = child(store, 'backingStore')) images.push(readImage(store))
  return { images, ended: store !== undefined }
}

function readImage(store: Element): DefinedImage {
  const nbd = nbdName(child(store, 'source'))
  return {
    ...readSource(store),
    format: child(store, 'format')?.getAttribute('type') ?? 'raw',
    ...(nbd !== undefined && { nbd }),
  }
}

/** As QEMU's driver puts a name together. */
function nbdName(source: Element | undefined): string | undefined {
  if (source?.getAttribute('protocol') !== 'nbd') return undefined
  const name = source.getAttribute('name')
  const server = child(source, 'host')
  const socket = server?.getAttribute('socket')
  const path = name ? `/${name}` : ''
  if (socket) return `nbd+unix://${path}?socket=${socket}`
  return `nbd://${server?.getAttribute('name')}:${server?.getAttribute('port') || '10809'}${path}`
}

/** A disk of an instance that is off. */
export interface DefinedDisk {
  readonly instance: string
  readonly disk: string
  /** Its image, symbolic links resolved. */
  readonly path: string
  readonly definition: string
}

/**
 * Refuses a disk of an instance that is off where libvirt will give QEMU other images under it than the headers name. What
 * the definition leaves out libvirt takes from the headers as well, but counts a relative name from the folder of the path
 * that it has itself, be that a symbolic link.
 *
 * @throws DISK_UNSUPPORTED
 */
export async function assertDefinedBacking(
  domains: LibvirtDomains,
  { definition, ...of }: DefinedDisk,
  run: RunOptions,
): Promise<void> {
  const source = readDomainXml(definition).disks.find(({ name }) => name === of.disk)
  const own = (source && (await domains.sourcePath(source, run))) ?? of.path
  const { images, ended } = readDefinedBacking(definition, of.disk)
  if (images.length === 0 && !ended && own === of.path) return
  const named = await headerChain(of.path, 'qcow2', run)
  const given: ChainImage[] = []
  for (const image of images) {
    const path = image.sliced ? undefined : await domains.sourcePath(image, run)
    const file = image.nbd ?? path ?? `something of the type ${image.type}`
    given.push({ file, format: image.format })
  }
  await assertSameChain({ ...of, given, named: ended ? named : named.slice(0, given.length) })
  if (ended) return
  const last = given.at(-1) ?? { file: own, format: 'qcow2' }
  const below = await headerChain(last.file, last.format, run)
  await assertSameChain({ ...of, given: [...given, ...below], named })
}
