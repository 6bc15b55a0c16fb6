import type { Document, Element } from '@xmldom/xmldom'
import { dropIdentity } from './domain-identity.ts'
import { VarveError } from './errors.ts'
import { rbdImageOf } from './rbd.ts'
import { child, children, parseDomain, remove, removeChildren, serializeXml, text } from './xml-elements.ts'

/** An RBD image as the source of a disk. */
export interface RbdSource {
  /** `<pool>/[<namespace>/]<image>` */
  readonly image: string
  /** The monitors, each as `host` or `host:port`. */
  readonly monitors: readonly string[]
  /** Path of a `ceph.conf`. */
  readonly conf?: string
  /** The cephx user and libvirt's secret with its key. */
  readonly auth?: { readonly user: string; readonly uuid?: string; readonly usage?: string }
  /** A snapshot of the image is what the instance sees. */
  readonly snapshot?: string
}

/** A `<disk>` of a domain. */
export interface DomainDisk {
  /** The target, such as `vda`. */
  readonly name: string
  /** `disk`, `cdrom`, `floppy` or `lun`. */
  readonly device: string
  /** `file`, `block`, `volume`, `network`, … */
  readonly type: string
  /** The driver's format, such as `qcow2`. */
  readonly format: string
  /** File or block device. */
  readonly source?: string
  /** The image, for the type `network` and the protocol `rbd`. */
  readonly rbd?: RbdSource
  /** Storage pool and volume, for the type `volume`. */
  readonly volume?: { readonly pool: string; readonly name: string }
  /** Whether a backing file is named here. QEMU is then given that one, whatever the image itself says. */
  readonly backed: boolean
  readonly shareable: boolean
  /** Whether the guest cannot write to it. */
  readonly readOnly: boolean
  readonly encrypted: boolean
  /** Whether what the guest sees is a part of the source. */
  readonly sliced: boolean
}

/** What Varve reads in libvirt's XML of a domain (libvirt's "Domain XML format"). */
export interface DomainDescription {
  readonly name: string
  readonly uuid?: string
  /** Whether QEMU runs it: libvirt gives such a domain an id. */
  readonly active: boolean
  readonly disks: readonly DomainDisk[]
  readonly nvram?: string
}

/** Reads the parts of a domain's XML that matter for its disks. */
export function readDomainXml(xml: string): DomainDescription {
  const { root } = parseDomain(xml)
  const uuid = text(child(root, 'uuid'))
  const nvram = nvramPath(root)
  return {
    name: text(child(root, 'name')) ?? '',
    ...(uuid !== undefined && { uuid }),
    active: root.hasAttribute('id'),
    disks: diskElements(root).map(readDisk),
    ...(nvram !== undefined && { nvram }),
  }
}

/** Where a disk is to be. */
export type DiskSource =
  | {
      /** A file or block device, or a new image of a disk that is an RBD image: `rbd:<pool>/<image>`. */
      readonly path: string
      readonly format: 'qcow2' | 'raw'
      /** Whether the path is that of a block device: libvirt has QEMU refuse the one as the other. Default: false. */
      readonly blockDevice?: boolean
    }
  | {
      /** Where it is in another definition; see {@link diskDefinition}. */
      readonly definition: string
    }

/**
 * The definition of a domain that has nothing but one of its disks: all that says where that is. Undefined where it has none
 * of that target.
 */
export function diskDefinition(xml: string, disk: string): string | undefined {
  const element = disksByName(xml).get(disk)
  return element && `<domain><devices>${serializeXml(element)}</devices></domain>`
}

/** What {@link rewriteDomainXml} changes. */
export interface DomainChanges {
  /** The name of a copy, which then shares nothing with the original that both cannot have at a time; see {@link dropIdentity}. */
  copyAs?: string
  /** The UUID of the instance whose definition it becomes, or of the copy. Default: libvirt chooses a copy's. */
  uuid?: string
  /** New sources of disks by target. */
  disks?: Readonly<Record<string, DiskSource>>
  /** Disks, by target, whose backing chain is dropped, as it is by a new path. */
  dropBacking?: readonly string[]
  /** Drops the other writable disks, which belong to the original. */
  onlyTheseDisks?: boolean
  /**
   * The XML of the instance as it is: an RBD image stays in the cluster that it is in there, and each disk that is not in
   * `disks` has the source that it has there. One that is not there goes, or as a drive loses its medium.
   */
  now?: string
  /** A new path of the UEFI variables. */
  nvram?: string
}

/** A domain's XML with another name, other disks or other UEFI variables; all else as it was. */
export function rewriteDomainXml(xml: string, changes: DomainChanges): string {
  const { document, root } = parseDomain(xml)
  if (changes.copyAs !== undefined) {
    const name = child(root, 'name')
    if (name) name.textContent = changes.copyAs
    dropIdentity(root)
  }
  if (changes.uuid !== undefined) setUuid(document, root, changes.uuid)
  const present = changes.now === undefined ? undefined : disksByName(changes.now)
  for (const element of diskElements(root)) {
    const { name } = readDisk(element)
    const change = changes.disks?.[name]
    if (change && 'definition' in change) setDefinedSource(document, element, change.definition)
    else if (change) setSource(document, element, change, present?.get(name))
    else if (changes.onlyTheseDisks) removeIfWritable(element)
    else if (present) takeSource(document, element, present.get(name))
    if (changes.dropBacking?.includes(name)) removeChildren(element, 'backingStore')
  }
  if (changes.nvram !== undefined) setNvram(document, root, changes.nvram)
  return serializeXml(document)
}

function setUuid(document: Document, root: Element, value: string): void {
  const uuid = child(root, 'uuid') ?? document.createElement('uuid')
  uuid.textContent = value
  if (!uuid.parentNode) root.insertBefore(uuid, root.firstChild)
}

function setNvram(document: Document, root: Element, path: string): void {
  const os = child(root, 'os')
  const nvram = child(os, 'nvram') ?? document.createElement('nvram')
  removeChildren(nvram, 'source')
  nvram.removeAttribute('type')
  nvram.textContent = path
  // A definition that leaves the choice of the firmware to libvirt may have none.
  if (!nvram.parentNode) os?.appendChild(nvram)
}

function setSource(
  document: Document,
  element: Element,
  to: Extract<DiskSource, { path: string }>,
  now: Element | undefined,
): void {
  for (const name of ['backingStore', 'mirror']) removeChildren(element, name)
  const image = rbdImageOf(to.path)
  if (image !== undefined) {
    if (now) moveToCluster(document, element, now)
    const { rbd, name } = readDisk(element)
    if (!rbd) {
      throw new VarveError(
        'INVALID_ARGUMENT',
        `The definition in the backup does not say in which cluster the disk ${name} is, which is an RBD image now. Restore the disks alone.`,
        { context: { disk: name, image } },
      )
    }
    const source = child(element, 'source')
    removeChildren(source, 'snapshot')
    source?.setAttribute('name', image)
    return
  }
  for (const name of ['source', 'auth']) removeChildren(element, name)
  element.setAttribute('type', to.blockDevice ? 'block' : 'file')
  const source = document.createElement('source')
  source.setAttribute(to.blockDevice ? 'dev' : 'file', to.path)
  element.insertBefore(source, child(element, 'target') ?? null)
  child(element, 'driver')?.setAttribute('type', to.format)
}

function disksByName(xml: string): Map<string, Element> {
  return new Map(diskElements(parseDomain(xml).root).map(element => [readDisk(element).name, element]))
}

/** What of a `<disk>` says where its content is, besides its driver. */
const SOURCE_PARTS = ['source', 'auth', 'encryption', 'backingStore', 'mirror']

function takeParts(
  document: Document,
  element: Element,
  parts: readonly string[],
  from: Element | undefined,
): void {
  for (const name of parts) {
    removeChildren(element, name)
    for (const found of children(from, name)) element.appendChild(document.importNode(found, true))
  }
  const type = from?.getAttribute('type')
  if (type) element.setAttribute('type', type)
}

/** The driver keeps how it caches and the like, but for a cache of the source's own, which libvirt forgets with that. */
function setDefinedSource(document: Document, element: Element, definition: string): void {
  const [from] = diskElements(parseDomain(definition).root)
  if (!from) return
  takeParts(document, element, SOURCE_PARTS, from)
  const driver = child(element, 'driver')
  driver?.setAttribute('type', readDisk(from).format)
  const cache = child(child(from, 'driver'), 'metadata_cache')
  if (cache && !child(driver, 'metadata_cache')) driver?.appendChild(document.importNode(cache, true))
}

function takeSource(document: Document, element: Element, present: Element | undefined): void {
  if (!present && removeIfWritable(element)) return
  takeParts(document, element, present ? ['driver', ...SOURCE_PARTS] : SOURCE_PARTS, present)
}

/** Whether it was: a drive with a medium is not. */
function removeIfWritable(element: Element): boolean {
  const isWritable = ['disk', 'lun'].includes(element.getAttribute('device') ?? 'disk')
  if (isWritable) remove(element)
  return isWritable
}

/** Varve restores to the cluster that the disk is on now: it, and the user and secret for it, are taken from there. */
function moveToCluster(document: Document, element: Element, now: Element): void {
  if (!readDisk(now).rbd) return
  for (const name of ['source', 'auth']) {
    removeChildren(element, name)
    const place = child(now, name)
    if (place) element.insertBefore(document.importNode(place, true), child(element, 'target') ?? null)
  }
  element.setAttribute('type', 'network')
  child(element, 'driver')?.setAttribute('type', 'raw')
}

function diskElements(root: Element): Element[] {
  return children(child(root, 'devices'), 'disk')
}

function readDisk(element: Element): DomainDisk {
  const source = child(element, 'source')
  const rbd = source && readRbd(element, source)
  return {
    name: child(element, 'target')?.getAttribute('dev') ?? '',
    device: element.getAttribute('device') ?? 'disk',
    format: child(element, 'driver')?.getAttribute('type') ?? 'raw',
    ...readSource(element),
    ...(rbd && { rbd }),
    backed: child(child(element, 'backingStore'), 'source') !== undefined,
    shareable: child(element, 'shareable') !== undefined,
    readOnly: child(element, 'readonly') !== undefined,
    encrypted:
      child(element, 'encryption') !== undefined ||
      (source ? child(source, 'encryption') !== undefined : false),
  }
}

/** Where the image of a `<disk>` or a `<backingStore>` is. */
export type ImageSource = Pick<DomainDisk, 'type' | 'source' | 'volume' | 'sliced'>

/** Reads the `<source>` of a `<disk>` or a `<backingStore>`. */
export function readSource(element: Element): ImageSource {
  const source = child(element, 'source')
  const path = source?.getAttribute('file') ?? source?.getAttribute('dev') ?? undefined
  const pool = source?.getAttribute('pool')
  const volume = source?.getAttribute('volume')
  return {
    type: element.getAttribute('type') ?? 'file',
    ...(path !== undefined && { source: path }),
    ...(pool && volume && { volume: { pool, name: volume } }),
    sliced: source ? child(source, 'slices') !== undefined : false,
  }
}

function readRbd(disk: Element, source: Element): RbdSource | undefined {
  if (disk.getAttribute('type') !== 'network' || source.getAttribute('protocol') !== 'rbd') return undefined
  const conf = child(source, 'config')?.getAttribute('file')
  const snapshot = child(source, 'snapshot')?.getAttribute('name')
  const auth = child(source, 'auth') ?? child(disk, 'auth') // libvirt takes it in either place
  const user = auth?.getAttribute('username')
  const secret = child(auth, 'secret')
  const [uuid, usage] = [secret?.getAttribute('uuid'), secret?.getAttribute('usage')]
  return {
    image: source.getAttribute('name') ?? '',
    monitors: children(source, 'host').map(monitorOf),
    ...(conf && { conf }),
    ...(user && { auth: { user, ...(uuid && { uuid }), ...(usage && { usage }) } }),
    ...(snapshot && { snapshot }),
  }
}

function monitorOf(host: Element): string {
  const name = host.getAttribute('name') ?? ''
  const port = host.getAttribute('port')
  if (!port) return name
  return name.includes(':') ? `[${name}]:${port}` : `${name}:${port}` // IPv6
}

function nvramPath(root: Element): string | undefined {
  const nvram = child(child(root, 'os'), 'nvram')
  const path = child(nvram, 'source')?.getAttribute('file') ?? text(nvram)
  return path?.startsWith('/') ? path : undefined
}
