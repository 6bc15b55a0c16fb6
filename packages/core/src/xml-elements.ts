import { DOMParser, type Document, type Element, XMLSerializer } from '@xmldom/xmldom'
import { VarveError } from './errors.ts'

/** A parsed definition of a domain. */
export interface DomainDocument {
  readonly document: Document
  /** The element `domain`. */
  readonly root: Element
}

/** The longest definition that is read, in bytes. libvirt's have some kilobytes. */
export const DEFINITION_MAX_BYTES: number = 1024 * 1024

/** The most elements in one: the time that some operations of the parser take grows with their square. */
const MAX_ELEMENTS = 10_000

/**
 * Reads a definition, which may come from a storage. Nothing that it names is fetched and no entity of its own is
 * replaced: libvirt writes none, and so it may have none.
 *
 * @throws INVALID_ARGUMENT for what is no domain's XML, or is too large to be that of one
 */
export function parseDomain(xml: string): DomainDocument {
  if (Buffer.byteLength(xml) > DEFINITION_MAX_BYTES)
    throw notReadable(`It has over ${DEFINITION_MAX_BYTES} bytes.`)
  const elements = xml.match(/<[^/!?]/g)?.length ?? 0
  if (elements > MAX_ELEMENTS) throw notReadable(`It has ${elements} elements, more than ${MAX_ELEMENTS}.`)
  const document = parse(xml)
  if (document.doctype) throw notReadable('It has a document type declaration.')
  const root = document.documentElement
  if (root?.tagName !== 'domain') throw new VarveError('INVALID_ARGUMENT', 'This is no libvirt domain XML.')
  return { document, root }
}

/** The text of a document, or of one of its elements. */
export function serializeXml(node: Document | Element): string {
  return new XMLSerializer().serializeToString(node)
}

function parse(xml: string): Document {
  try {
    return new DOMParser({
      onError: (level, message) => {
        if (level !== 'warning') throw new Error(message)
      },
    }).parseFromString(xml, 'text/xml')
  } catch (error) {
    throw notReadable('It is no XML.', error)
  }
}

function notReadable(what: string, cause?: unknown): VarveError {
  const message = `The domain XML cannot be read: ${what} If it is a backup's, restore the disks alone.`
  return new VarveError('INVALID_ARGUMENT', message, { cause })
}

/** The elements of a name right below an element. */
export function children(element: Element | undefined, name: string): Element[] {
  if (!element) return []
  return Array.from(element.getElementsByTagName(name)).filter(found => found.parentNode === element)
}

/** The first one of {@link children}. */
export function child(element: Element | undefined, name: string): Element | undefined {
  return children(element, name)[0]
}

/** What is written in an element, without the space around it. */
export function text(element: Element | undefined): string | undefined {
  const content = element?.textContent?.trim()
  return content ? content : undefined
}

/** Takes an element out of its document. */
export function remove(element: Element | undefined): void {
  element?.parentNode?.removeChild(element)
}

/** Takes out the elements of a name right below one: a definition from a storage may have several where libvirt writes one. */
export function removeChildren(element: Element | undefined, name: string): void {
  for (const found of children(element, name)) remove(found)
}
