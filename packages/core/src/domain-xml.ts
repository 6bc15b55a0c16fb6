import type { Document, Element } from '@xmldom/xmldom'
import { dropIdentity } from './domain-identity.ts'
import { child, children, parseDomain, remove, serializeXml, text } from './xml-elements.ts'

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
  /** Storage pool and volume, for the type `volume`. */
  readonly volume?: { readonly pool: string; readonly name: string }
  /** Whether a backing file is named here. QEMU is then given that one, whatever the image itself says. */
  readonly backed: boolean
  readonly shareable: boolean
  readonly encrypted: boolean
}

/** What Varve reads in libvirt's XML of a domain (libvirt's "Domain XML format"). */
export interface DomainDescription {
  readonly name: string
  readonly uuid?: string
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
    disks: diskElements(root).map(readDisk),
    ...(nvram !== undefined && { nvram }),
  }
}

/** What {@link rewriteDomainXml} changes. */
export interface DomainChanges {
  /** The name of a copy, which then shares nothing with the original that both cannot have at a time; see {@link dropIdentity}. */
  copyAs?: string
  /** The UUID of the instance whose definition it becomes, or of the copy. Default: libvirt chooses a copy's. */
  uuid?: string
  /**
   * New files of disks by target. Their backing chain is dropped.
   */
  disks?: Readonly<Record<string, { readonly path: string; readonly format: 'qcow2' | 'raw' }>>
  /** Drops the other writable disks, which belong to the original. */
  onlyTheseDisks?: boolean
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
  for (const element of diskElements(root)) {
    const change = changes.disks?.[readDisk(element).name]
    if (change) setSource(document, element, change)
    else if (changes.onlyTheseDisks && ['disk', 'lun'].includes(element.getAttribute('device') ?? 'disk'))
      remove(element)
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
  for (const source of children(nvram, 'source')) remove(source)
  nvram.removeAttribute('type')
  nvram.textContent = path
  // A definition that leaves the choice of the firmware to libvirt may have none.
  if (!nvram.parentNode) os?.appendChild(nvram)
}

function setSource(document: Document, element: Element, to: { path: string; format: string }): void {
  for (const name of ['backingStore', 'mirror', 'source']) remove(child(element, name))
  const block = element.getAttribute('type') === 'block' && to.path.startsWith('/dev/')
  element.setAttribute('type', block ? 'block' : 'file')
  const source = document.createElement('source')
  source.setAttribute(block ? 'dev' : 'file', to.path)
  element.insertBefore(source, child(element, 'target') ?? null)
  child(element, 'driver')?.setAttribute('type', to.format)
}

function diskElements(root: Element): Element[] {
  return children(child(root, 'devices'), 'disk')
}

function readDisk(element: Element): DomainDisk {
  const source = child(element, 'source')
  const path = source?.getAttribute('file') ?? source?.getAttribute('dev') ?? undefined
  const pool = source?.getAttribute('pool')
  const volume = source?.getAttribute('volume')
  return {
    name: child(element, 'target')?.getAttribute('dev') ?? '',
    device: element.getAttribute('device') ?? 'disk',
    type: element.getAttribute('type') ?? 'file',
    format: child(element, 'driver')?.getAttribute('type') ?? 'raw',
    ...(path !== undefined && { source: path }),
    ...(pool && volume && { volume: { pool, name: volume } }),
    backed: child(child(element, 'backingStore'), 'source') !== undefined,
    shareable: child(element, 'shareable') !== undefined,
    encrypted:
      child(element, 'encryption') !== undefined ||
      (source ? child(source, 'encryption') !== undefined : false),
  }
}

function nvramPath(root: Element): string | undefined {
  const nvram = child(child(root, 'os'), 'nvram')
  const path = child(nvram, 'source')?.getAttribute('file') ?? text(nvram)
  return path?.startsWith('/') ? path : undefined
}
