import { DOMParser, type Document, type Element, XMLSerializer } from '@xmldom/xmldom'
import { VarveError } from './errors.ts'

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
  const root = parse(xml).documentElement
  if (root?.tagName !== 'domain') throw new VarveError('INVALID_ARGUMENT', 'This is no libvirt domain XML.')
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
  /** A new name; the UUID and the MAC addresses are then dropped, so that libvirt makes new ones. */
  name?: string
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
  const document = parse(xml)
  const root = document.documentElement
  if (root?.tagName !== 'domain') throw new VarveError('INVALID_ARGUMENT', 'This is no libvirt domain XML.')
  if (changes.name !== undefined) {
    const name = child(root, 'name')
    if (name) name.textContent = changes.name
    remove(child(root, 'uuid'))
    for (const mac of Array.from(root.getElementsByTagName('mac'))) remove(mac)
  }
  for (const element of diskElements(root)) {
    const change = changes.disks?.[readDisk(element).name]
    if (change) setSource(document, element, change)
    else if (changes.onlyTheseDisks && ['disk', 'lun'].includes(element.getAttribute('device') ?? 'disk'))
      remove(element)
  }
  const nvram = child(child(root, 'os'), 'nvram')
  if (changes.nvram !== undefined && nvram) {
    for (const source of Array.from(nvram.getElementsByTagName('source'))) remove(source)
    nvram.removeAttribute('type')
    nvram.textContent = changes.nvram
  }
  return new XMLSerializer().serializeToString(document)
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

function parse(xml: string): Document {
  try {
    return new DOMParser({
      onError: (level, message) => {
        if (level !== 'warning') throw new Error(message)
      },
    }).parseFromString(xml, 'text/xml')
  } catch (error) {
    throw new VarveError('INVALID_ARGUMENT', 'The domain XML cannot be parsed.', { cause: error })
  }
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

function children(element: Element | undefined, name: string): Element[] {
  if (!element) return []
  return Array.from(element.getElementsByTagName(name)).filter(found => found.parentNode === element)
}

function child(element: Element | undefined, name: string): Element | undefined {
  return children(element, name)[0]
}

function text(element: Element | undefined): string | undefined {
  const content = element?.textContent?.trim()
  return content ? content : undefined
}

function remove(element: Element | undefined): void {
  element?.parentNode?.removeChild(element)
}
